/* cursor.h - reading text of unknown length; every function checks what is left before it reads. */
#ifndef TRACEDBG_CURSOR_H
#define TRACEDBG_CURSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct cursor {
	const uint8_t *at, *end;
};

static const uint8_t HEX[256] = { /* value + 1 of a digit as QEMU prints them; 0: none */
	['0'] = 1, ['1'] = 2, ['2'] = 3, ['3'] = 4, ['4'] = 5, ['5'] = 6, ['6'] = 7, ['7'] = 8, ['8'] = 9, ['9'] = 10,
	['a'] = 11, ['b'] = 12, ['c'] = 13, ['d'] = 14, ['e'] = 15, ['f'] = 16,
};

static inline size_t left(const struct cursor *c)
{
	return (size_t)(c->end - c->at);
}

static inline bool is(struct cursor *c, const char *text, size_t n)
{
	if (left(c) < n || memcmp(c->at, text, n) != 0)
		return false;
	c->at += n;
	return true;
}

#define IS(c, text) is(c, text, sizeof(text) - 1)

static inline bool skip(struct cursor *c, size_t n)
{
	if (left(c) < n)
		return false;
	c->at += n;
	return true;
}

/* Exactly n digits. */
static inline bool hex(struct cursor *c, unsigned n, uint64_t *value)
{
	uint64_t v = 0;

	if (left(c) < n)
		return false;
	for (unsigned i = 0; i < n; i++) {
		unsigned digit = HEX[c->at[i]];
		if (digit == 0)
			return false;
		v = v << 4 | (digit - 1);
	}
	c->at += n;
	*value = v;
	return true;
}

static inline bool hex32(struct cursor *c, unsigned n, uint32_t *value)
{
	uint64_t v;

	if (!hex(c, n, &v))
		return false;
	*value = (uint32_t)v;
	return true;
}

/* Exactly n digits, whatever they say. */
static inline bool digits_only(struct cursor *c, unsigned n)
{
	uint8_t bad = 0;

	if (left(c) < n)
		return false;
	for (unsigned i = 0; i < n; i++)
		bad |= HEX[c->at[i]] == 0;
	c->at += n;
	return bad == 0;
}

/* 8 or 16 digits, then a byte that is none. */
static inline bool address(struct cursor *c, uint64_t *value, unsigned *digits)
{
	if (left(c) < 17)
		return false;
	*digits = HEX[c->at[8]] == 0 ? 8 : 16;
	return hex(c, *digits, value) && HEX[c->at[0]] == 0;
}

/* 1 to `most` decimal digits. */
static inline bool decimal(struct cursor *c, unsigned most, uint64_t *value)
{
	uint64_t v = 0;
	unsigned n = 0;

	while (n < most && left(c) > 0 && *c->at >= '0' && *c->at <= '9') {
		v = v * 10 + (uint64_t)(*c->at++ - '0');
		n++;
	}
	*value = v;
	return n > 0;
}

static inline bool decimals(struct cursor *c, unsigned n, uint64_t *value)
{
	const uint8_t *start = c->at;

	return decimal(c, n, value) && c->at == start + n;
}

/* The rest of a line of at most `most` bytes, with its end. */
static inline bool line(struct cursor *c, size_t most)
{
	size_t n = left(c) < most + 1 ? left(c) : most + 1;
	const uint8_t *stop = memchr(c->at, '\n', n);

	if (stop == NULL)
		return false;
	c->at = stop + 1;
	return true;
}

#endif
