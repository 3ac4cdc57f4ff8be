/*
 * fuzz_pt.c - feeds the decoder of Intel PT hostile bytes under sanitizers, in pieces of any size: `fuzz_pt SEED COUNT` makes
 * COUNT streams (also the entry point of libFuzzer with -DLIBFUZZER).  However the bytes come, the events are the same.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pt.h"
#include "tdb.h"

#define MOST 4096

static uint64_t seed;
static struct pt_text text[PT_MARKS];

static uint64_t next(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static uint32_t below(uint32_t n)
{
	return (uint32_t)(next() >> 16) % n;
}

static void check(int good, const char *what)
{
	if (!good) {
		fprintf(stderr, "%s\n", what);
		abort();
	}
}

/* Decode in pieces (step 0: at once), each in memory of its own size; returns the number of events. */
static uint64_t decode(const uint8_t *data, uint64_t size, uint64_t step, struct pt_stream *s, struct tdb_event *ret)
{
	uint64_t n = 0, at = 0, end = 0, base = 0;

	*s = (struct pt_stream){ .ctc_n = 250, .ctc_d = 3, .mtc_shift = 9 };
	for (;;) {
		uint64_t upto = step && size - end > step ? end + 1 + below((uint32_t)step) : size, place;
		int last = upto == size;
		uint8_t *piece = malloc(upto - base + 1);

		memcpy(piece, data + base, upto - base);
		place = at - base;
		for (;;) {
			struct tdb_event out[PT_ROOM + 5];
			int64_t got = pt_decode(s, piece, upto - base, &place, last, text, out, PT_ROOM + 5);

			check(got >= 0 && got <= PT_ROOM + 5 && place <= upto - base, "bad answer");
			check(n + (uint64_t)got <= 2 * MOST + 8, "too many events");
			memcpy(ret + n, out, (size_t)got * sizeof(*out));
			n += (uint64_t)got;
			if (s->mark) {
				check(s->mark <= PT_MARKS && !text[s->mark - 1].size, "a text was asked for twice");
				text[s->mark - 1] = (struct pt_text){ s->mark, 4, 0 };
			} else if (got + PT_ROOM <= PT_ROOM + 5) {
				break;
			}
		}
		free(piece);
		at = base + place;
		check(s->offset == at, "offset");
		end = upto;
		base = at > PT_HISTORY ? at - PT_HISTORY : 0;
		if (last)
			return n;
	}
}

static void one(const uint8_t *data, uint64_t size)
{
	static struct tdb_event whole[2 * MOST + 8], pieces[2 * MOST + 8];
	static struct pt_packet packet[MOST];
	struct pt_stream a, b;
	uint64_t n, at = 0;
	int block = 0;

	n = decode(data, size, 0, &a, whole);
	check(a.offset == size, "not all was taken");
	check(n == decode(data, size, 1 + below(40), &b, pieces), "another number of events in pieces");
	check(!memcmp(whole, pieces, n * sizeof(*whole)), "other events in pieces");
	check(!memcmp(a.counts, b.counts, sizeof(a.counts)) && !memcmp(a.damage_at, b.damage_at, sizeof(a.damage_at)),
	      "other counts in pieces");
	while (at < size && pt_lex(data, size, &at, &block, packet, 1 + below(MOST)) > 0)
		;
	check(pt_gap(&a, 1, text, whole, PT_ROOM) >= 0 && pt_settle(&a, next(), text, whole, PT_ROOM) >= 0, "gap");
}

#ifdef LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	seed = 88172645463325252ull ^ size;
	one(data, size < MOST ? size : MOST);
	return 0;
}
#else
/* Bytes that are packets more often than not: random ones end in the first few. */
static uint64_t make(uint8_t *data)
{
	static const char *const opening[] = {
		"\x02\x13", "\x02\x53", "\x1d", "\x3d", "\x7d", "\x0d", "\x6d", "\x11", "\x71", "\x01", "\x99", "\x19", "\x59",
		"\x02\xf3", "\x02\x83", "\x02\x63", "\x02\x33", "\x02\x23", "\x02\x73", "\x02\x43", "\x02\xc8", "\xa6", "\x03", "\x07",
	};
	static const uint8_t payload[] = { 2, 9, 0, 2, 6, 0, 6, 0, 6, 0, 1, 7, 1, 0, 0, 1, 0, 0, 5, 6, 5, 0, 0, 2 };
	uint64_t size = 0, most = 1 + below(MOST - 64);

	while (size < most) {
		uint32_t i = below(sizeof(payload)), kind = below(40);

		if (kind == 0) {
			data[size++] = (uint8_t)next();
			continue;
		}
		if (kind < 4) {
			for (int j = 0; j < 8 - (kind == 3 && !below(4)); j++, size += 2)
				memcpy(data + size, "\x02\x82", 2);
			if (below(2))
				memcpy(data + size, "\x99\x05\x02\x23", 4), size += 4;
			continue;
		}
		memcpy(data + size, opening[i], strlen(opening[i]));
		size += strlen(opening[i]);
		for (int j = 0; j < payload[i]; j++)
			data[size++] = below(3) ? (uint8_t)below(17) : (uint8_t)next();
		if (i == 0 && below(2))
			data[size - 2] |= 0x80;
		if (i == 18)
			data[size - 3] = 0, data[size - 1] = 0;
	}
	return size;
}

int main(int argc, char **argv)
{
	static uint8_t data[MOST];

	if (argc != 3)
		return 2;
	seed = 88172645463325252ull + strtoull(argv[1], NULL, 0);
	for (uint64_t n = strtoull(argv[2], NULL, 0); n; n--) {
		uint64_t size = make(data);
		uint8_t *exact = malloc(size);

		memcpy(exact, data, size);
		one(exact, size);
		free(exact);
	}
	return 0;
}
#endif
