/*
 * fuzz_replay.c - feeds the core hostile events under sanitizers: `fuzz_replay SEED COUNT` makes COUNT random traces,
 * `fuzz_replay -f FILE...` takes events from files (any bytes; also the entry point of libFuzzer with -DLIBFUZZER).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tdb.h"

#define CPUS 3

static uint64_t seed;

static uint64_t next(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static uint32_t below(uint32_t n)
{
	return (uint32_t)(next() % n);
}

static uint64_t address(void)
{
	static const uint64_t base[] = { 0x110000, 0x10e000, 0x10c000, 0x108000, 0x11d000, 0x127000, 0, UINT64_MAX, 1ull << 47,
					 0xffff800000000000ull };

	if (!below(8))
		return next();
	return base[below(10)] - 8 * below(64) - (below(6) ? 0 : below(8));
}

static void make_event(struct tdb_event *e)
{
	static const uint8_t vector[] = { 1, 2, 2, 2, 3, 8, 14, 18, 0xec };

	memset(e, 0, sizeof(*e));
	e->known = below(4) ? 0x1fff : (uint16_t)next();
	e->kind = below(3) ? (below(2) ? TDB_DELIVER : TDB_RETURN) : (uint8_t)below(36);
	e->cpu = (uint16_t)(below(50) ? below(CPUS) : below(70000));
	e->arg = below(10) ? vector[below(9)] : (uint8_t)next();
	if (e->kind == TDB_WRITE)
		e->arg = (uint8_t)below(10);
	e->source = (uint8_t)below(11);
	e->flags = below(6) ? 0 : (uint8_t)next();
	e->rip = below(2) ? 0x1000 + below(8) : next();
	e->rsp = address();
	e->addr = e->kind == TDB_RETURN ? 0x1000 + below(8) : address();
	e->value = address();
	e->code = below(3) ? below(8) : (uint32_t)next();
	e->cs = below(4) ? 8 : 0x33;
	e->ss = 0x10;
	e->rflags = (uint32_t)next();
}

static void look(tdb_replay *r, uint64_t count)
{
	static struct tdb_stack stacks[64];
	static struct tdb_frame frames[64];
	static struct tdb_word words[64];
	static struct tdb_finding findings[64];
	struct tdb_cpu cpu;
	struct tdb_tss tss;
	struct tdb_gate gate;
	struct tdb_stats stats;
	uint64_t digest, again;

	for (int i = 0; i < 6; i++) {
		uint64_t position = count ? next() % (count + 1) : 0;
		int64_t left;

		while ((left = tdb_seek_some(r, position, 1 + below(100))) > 0)
			;
		if (left < 0 || tdb_position(r) != position)
			abort();
		tdb_digest(r, &digest);
		while (tdb_seek_some(r, count / 2, 1 << 20) > 0)
			;
		while (tdb_seek_some(r, position, 1 << 20) > 0)
			;
		tdb_digest(r, &again);
		if (digest != again)
			abort();
		tdb_get_stacks(r, stacks, below(65));
		tdb_get_frames(r, frames, below(65));
		tdb_get_words(r, address(), address(), words, below(65));
		tdb_get_findings(r, below(4), findings, below(65));
		tdb_get_last_frame(r, frames);
		tdb_get_cpu(r, below(CPUS + 1), &cpu);
		tdb_get_tss(r, below(CPUS + 1), &tss);
		tdb_get_gate(r, below(CPUS + 1), below(300), &gate);
		tdb_find(r, position, below(2) ? 1 : -1, next(), (int)below(300) - 20, (int)below(5) - 1, 1 + below(1000));
		tdb_get_stats(r, &stats);
	}
}

static void run(const struct tdb_event *events, uint64_t count)
{
	static struct tdb_idt idt[2];
	static const uint8_t memory[64] = { 1, 2, 3 };
	struct tdb_tss tss[CPUS] = { 0 };
	struct tdb_cpu_layout cpu[CPUS] = { 0 };
	struct tdb_region region[6] = {
		{ .lo = 0x10e000, .hi = 0x110000, .slot = 1 }, { .lo = 0x10c000, .hi = 0x10e000, .slot = 2 },
		{ .lo = 0x10a000, .hi = 0x10c000, .slot = 3, .cpu = 1 }, { .lo = 0x107f00, .hi = 0x108000, .slot = 8 },
		{ .lo = 0x10d000, .hi = 0x10e800, .slot = 4, .cpu = 2 }, { .lo = 0x111000, .hi = 0x113000, .kind = TDB_REGION_USER },
	};
	struct tdb_memory mem = { 0x10dff4, sizeof(memory), memory };
	struct tdb_config cfg;
	struct tdb_layout layout = {
		.tss = tss, .idt = idt, .cpu = cpu, .region = region, .memory = &mem, .tss_count = CPUS, .idt_count = 2,
		.cpu_count = CPUS, .region_count = 6, .memory_count = 1, .fidelity = below(4),
	};
	uint8_t bytes[256] = { 0 };
	tdb_replay *r;

	tdb_config_init(&cfg);
	cfg.snapshot_interval = 1 + below(40);
	cfg.max_snapshots = 2 + below(8);
	cfg.max_pages = 2 + below(30);
	cfg.max_frames = 1 + below(30);
	cfg.max_findings = below(20);
	for (int v = 0; v < 256; v++)
		idt[0].gate[v] = (struct tdb_gate){ .offset = 0x1000, .ist = (uint8_t)(v % 5), .type = v % 7 ? 0xe : 0xf,
						    .flags = v % 11 ? 3 : 1 };
	idt[1].base = 0x1000;
	for (int i = 0; i < CPUS; i++) {
		tss[i] = (struct tdb_tss){ .base = 0x1000u * (unsigned)i, .rsp = { 0x108000 },
					   .ist = { 0, 0x110000, 0x10e000, 0x10c000, 0x8600111111111111ull }, .known = 0x3ff01 };
		cpu[i] = (struct tdb_cpu_layout){ i, 0 };
	}
	if (tdb_open(&cfg, events, count, CPUS, bytes, sizeof(bytes), &layout, &r))
		abort();
	while (tdb_scan(r, 1 + below(50)) > 0)
		;
	look(r, count);
	tdb_close(r);
}

#ifdef LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct tdb_event *events = malloc(size + 64);

	memcpy(events, data, size);
	seed = 88172645463325252ull + size;
	run(events, size / sizeof(*events));
	free(events);
	return 0;
}
#else
static void run_file(const char *path)
{
	FILE *f = fopen(path, "rb");
	struct tdb_event *events = malloc(1 << 20);
	size_t size = f && events ? fread(events, 1, 1 << 20, f) : 0;

	seed = 88172645463325252ull + size;
	if (events)
		run(events, size / sizeof(*events));
	free(events);
	if (f)
		fclose(f);
}

int main(int argc, char **argv)
{
	if (argc > 2 && !strcmp(argv[1], "-f")) {
		for (int i = 2; i < argc; i++)
			run_file(argv[i]);
		return 0;
	}
	for (long i = 0, n = argc > 2 ? atol(argv[2]) : 100; i < n; i++) {
		struct tdb_event events[400];
		uint32_t count;

		seed = (uint64_t)(argc > 1 ? atol(argv[1]) : 1) * 1000003u + (uint64_t)i + 88172645463325252ull;
		count = below(400);
		for (uint32_t k = 0; k < count; k++)
			make_event(&events[k]);
		run(events, count);
	}
	return 0;
}
#endif
