/*
 * fuzz_xentrace.c - damages files of xentrace and reads them under sanitizers: `fuzz_xentrace FORMAT SEED COUNT FILE...`.
 * FORMAT holds the bytes of a struct xt_format, as the reader makes it.  Every piece of a file lies in memory of its own size,
 * and so do the decoders: a byte too far is seen.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tdb.h"
#include "xentrace.h"

static uint64_t seed;

static uint64_t next(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static uint64_t below(uint64_t n)
{
	return next() % n;
}

static void fail(const char *what)
{
	fprintf(stderr, "%s\n", what);
	exit(1);
}

static uint8_t *load(const char *path, uint64_t *size)
{
	FILE *file = fopen(path, "rb");
	uint8_t *data;
	long length;

	if (!file || fseek(file, 0, SEEK_END) || (length = ftell(file)) < 0 || fseek(file, 0, SEEK_SET))
		fail("cannot read a file");
	data = malloc((size_t)length + 1);
	if (!data || fread(data, 1, (size_t)length, file) != (size_t)length)
		fail("cannot read a file");
	fclose(file);
	*size = (uint64_t)length;
	return data;
}

/* Half of the changes are of whole words: a header, a size, another CPU. */
static uint64_t damage(uint8_t *data, uint64_t size)
{
	static const uint32_t word[] = { 0, 1, 4095, 4096, 0x2001f003, 0xffffffff, 0x7ffffffc, 0x1f001, 0xc001f001, 0x80081001,
					 0xb0081102, 0x82010, 0x8200f, 0xb0802008, 0xf0802003, 12, 40 };

	for (uint64_t n = below(9); n && size >= 4; n--) {
		uint64_t at = below(size);

		if (below(2))
			data[at] = (uint8_t)(below(2) ? next() : data[at] ^ 1u << below(8));
		else
			memcpy(data + (at & ~3ull), &word[below(sizeof(word) / sizeof(*word))], size - (at & ~3ull) < 4 ? 0 : 4);
		if (!below(8)) {
			uint64_t gone = below(size - at < 40 ? size - at + 1 : 40);

			memmove(data + at, data + at + gone, size - at - gone);
			size -= gone;
		}
	}
	return below(4) ? size : below(size + 1);
}

static void take(const struct tdb_event *events, uint64_t count, uint64_t *sum)
{
	if (!count || !events)
		fail("no events");
	for (uint64_t n = 0; n < count; n++) {
		if (events[n].kind > TDB_MARK || !(events[n].known & TDB_K_CPU) || events[n].cpu >= XT_CPUS)
			fail("a strange event");
		*sum += 1;
	}
}

/* Two decoders, one that is soon full. */
static void *decoder(uint64_t held)
{
	static void *memory[2];
	void **which = &memory[held > 100];
	size_t bytes = (size_t)xt_size(held);

	if (!*which)
		*which = aligned_alloc(64, bytes);
	if (!*which)
		fail("no memory");
	return memset(*which, 0, bytes);
}

static void read_all(const struct xt_format *format, const uint8_t *data, uint64_t size, uint64_t held)
{
	int64_t taken;
	uint64_t at = 0, have = 0, made = 0, count = 0;
	void *memory = decoder(held);
	const struct tdb_event *events;
	struct xt_told told;
	uint8_t *piece = NULL;
	int last;

	if (xt_open(memory, held, format) < 0)
		fail("the format is refused");
	do {
		uint64_t more = below(3) ? below(200) : size;

		more = more < size - at ? more : size - at;
		piece = realloc(piece, (size_t)(have + more) ? (size_t)(have + more) : 1);
		memcpy(piece + have, data + at, (size_t)more);
		have += more;
		at += more;
		last = at == size;
		do {
			taken = xt_read(memory, piece, have, last, &events, &count);
			if (taken < 0 || (uint64_t)taken > have)
				fail("takes too much");
			if (count)
				take(events, count, &made);
			memmove(piece, piece + taken, (size_t)(have - (uint64_t)taken));
			have -= (uint64_t)taken;
			piece = realloc(piece, (size_t)have ? (size_t)have : 1);
		} while (count);
		if (have > 40)
			fail("leaves too much");
	} while (!last);
	xt_tell(memory, &told);
	if (!told.ended || have || told.cpus > XT_CPUS || made > 2 * told.records + told.gaps)
		fail("a strange end");
	free(piece);
}

int main(int argc, char **argv)
{
	uint64_t size, count;
	struct xt_format *format;

	if (argc < 5)
		fail("fuzz_xentrace FORMAT SEED COUNT FILE...");
	format = (struct xt_format *)load(argv[1], &size);
	if (size != sizeof(*format))
		fail("the format has another size");
	seed = strtoull(argv[2], NULL, 0) * 0x9e3779b97f4a7c15ull + 1;
	count = strtoull(argv[3], NULL, 0);
	for (int n = 4; n < argc; n++) {
		uint8_t *data = load(argv[n], &size);

		for (uint64_t i = 0; i < count; i++) {
			uint8_t *copy = malloc(size + 1);

			if (!copy)
				fail("no memory");
			memcpy(copy, data, size);
			read_all(format, copy, i ? damage(copy, size) : size, below(2) ? 24 : 4096);
			free(copy);
		}
		free(data);
	}
	free(format);
	return 0;
}
