/* stack.c - which stack an address belongs to: a named one of the layout, or a 16 KiB block. */
#include "core.h"

#define BLOCK_SHIFT 14

uint64_t stack_key(const struct inputs *in, uint64_t addr)
{
	const uint64_t *top = in->stack_top;
	uint32_t lo = 0, hi = in->stack_count;

	while (lo < hi) {                /* the first region with hi >= addr */
		uint32_t mid = (lo + hi) / 2;

		if (top[mid] >= addr)
			hi = mid;
		else
			lo = mid + 1;
	}
	if (lo < in->stack_count && in->stack[lo].lo < addr)
		return lo;
	return KEY_ANON | (addr - 1) >> BLOCK_SHIFT;
}

void stack_bounds(const struct inputs *in, uint64_t key, uint64_t *lo, uint64_t *hi)
{
	if (stack_named(key)) {
		*lo = in->stack[key].lo;
		*hi = in->stack[key].hi;
	} else {
		*lo = (key & ~KEY_ANON) << BLOCK_SHIFT;
		*hi = *lo + (1u << BLOCK_SHIFT);
		if (*hi == 0)
			*hi = UINT64_MAX;
	}
}
