/* stack.c - which stack an address belongs to: a named one of the layout, or a 16 KiB block. */
#include "core.h"

#define BLOCK_SHIFT 14

/* Fill a cache entry with the whole interval (lo, hi] around an address that has one answer. */
static uint64_t look_up(const struct inputs *in, uint64_t addr, struct stack_cache *entry)
{
	const uint64_t *top = in->stack_top;
	uint32_t lo = 0, hi = in->stack_count;
	uint64_t block = (addr - 1) >> BLOCK_SHIFT, below, above;

	while (lo < hi) {                /* the first region with hi >= addr */
		uint32_t mid = (lo + hi) / 2;

		if (top[mid] >= addr)
			hi = mid;
		else
			lo = mid + 1;
	}
	below = lo ? top[lo - 1] : 0;
	if (lo < in->stack_count && in->stack[lo].lo < addr) {
		entry->lo = below > in->stack[lo].lo ? below : in->stack[lo].lo;
		entry->hi = top[lo];
		return entry->key = lo;
	}
	entry->lo = below > block << BLOCK_SHIFT ? below : block << BLOCK_SHIFT;
	above = (block << BLOCK_SHIFT) + ((1u << BLOCK_SHIFT) - 1);
	if (lo < in->stack_count && in->stack[lo].lo < above)
		above = in->stack[lo].lo;
	entry->hi = above;
	return entry->key = KEY_ANON | block;
}

uint64_t stack_key(const struct inputs *in, uint64_t addr)
{
	struct stack_cache *entry = &in->stack_cache[(addr - 1) >> 13 & (STACK_CACHE - 1)];

	if (likely(addr > entry->lo && addr <= entry->hi))
		return entry->key;
	return look_up(in, addr, entry);
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
