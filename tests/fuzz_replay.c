/*
 * fuzz_replay.c - feeds the core hostile events under sanitizers: `fuzz_replay SEED COUNT` makes COUNT random traces,
 * `fuzz_replay -f FILE...` takes events from files (any bytes; also the entry point of libFuzzer with -DLIBFUZZER).
 */
#include <stdbool.h>
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
	return base[below(10)] - 8 * below(64) + (below(4) ? 0 : 8 * below(64)) - (below(6) ? 0 : below(8));
}

/* What an event of its kind would hold; random bytes reach little of what is behind a check. */
static void make_plausible(struct tdb_event *e)
{
	static const uint32_t msr[] = { 0x17a, 0x17a, 0x17a, 0x808, 0xc0000081, 0xc0000082, 0xc0000084, 0x174, 0x175, 0x176,
					0x1cc, 0x1cd, 0x1ce, 0x1cf, 0x1d0, 0x1d4 };

	switch (e->kind) {
	case TDB_RETURN:
		e->arg = (uint8_t)(below(2) ? TDB_RET_IRET : below(4));
		e->addr = 0x1000 + below(8);
		break;
	case TDB_WRITE:
		e->arg = (uint8_t)below(10);
		break;
	case TDB_TSS:
		e->arg = (uint8_t)(below(2) ? below(3) : 8 + below(8));
		break;
	case TDB_GATE:
		e->code = below(8) | 0x8e00 | (below(4) ? 0 : 0x6100);
		break;
	case TDB_SYSCALL: case TDB_SYSRET: case TDB_SYSENTER:
		e->cs = below(4) ? 0x33 : 8;
		break;
	case TDB_UNBLOCK: case TDB_SHADOW: case TDB_GS: case TDB_VMEXIT: case TDB_VMENTRY: case TDB_INIT:
		e->arg = (uint8_t)below(3);
		break;
	case TDB_RAISE:
		e->arg = (uint8_t)(below(2) ? 2 : below(40));
		e->source = below(2) ? TDB_SRC_NMI : TDB_SRC_FIXED;
		break;
	case TDB_MSR:
		e->code = msr[below(16)];
		e->value = below(3) ? address() : next();
		break;
	case TDB_CR:
		e->arg = below(2) ? 4 : 8;
		e->value = e->arg == 8 ? below(16) : (uint64_t)below(2) << 32 | below(2) << 6;
		break;
	case TDB_TOKEN:
		e->arg = (uint8_t)below(9);
		e->code = below(2);
		e->value = below(2);
		break;
	case TDB_SHUTDOWN:
		e->arg = (uint8_t)below(5);
		break;
	default:
		break;
	}
}

/* Takes up what an earlier event said: a return of its frame, its context again, a store or a copy there. */
static void borrow(struct tdb_event *e, const struct tdb_event *from)
{
	const uint64_t top[5] = { from->rsp & ~15ull, 0x110000, 0x10e000, 0x10c000, 0x108000 };
	uint64_t rip_addr = top[below(4) ? from->arg % 5 : below(5)] - (below(8) ? 40 : 56);

	e->cpu = from->cpu;
	switch (e->kind) {
	case TDB_RETURN:
		e->rsp = rip_addr + (below(4) ? 0 : 8 * below(4) - 16);
		e->addr = below(4) ? from->rip : below(2) ? from->cs : from->code;
		e->value = from->rsp;
		e->cs = from->cs;
		e->ss = from->ss;
		e->rflags = from->rflags;
		break;
	case TDB_MOVE:
		e->addr = rip_addr;
		break;
	case TDB_WRITE:
		e->addr = rip_addr + 8 * below(5);
		e->rsp = below(2) ? e->addr : e->rsp;
		e->value = below(2) ? from->rsp : e->value;
		break;
	default:
		e->rip = from->rip;
		e->rsp = below(3) ? from->rsp : rip_addr + 40 + 8 * below(5);
	}
}

static void make_event(struct tdb_event *e)
{
	static const uint8_t vector[] = { 1, 2, 2, 2, 3, 8, 10, 13, 14, 14, 18, 18, 20, 0x1d, 0xeb, 0xec };

	memset(e, 0, sizeof(*e));
	e->known = below(4) ? 0x1fff : (uint16_t)next();
	e->kind = below(3) ? (below(2) ? TDB_DELIVER : TDB_RETURN) : below(4) ? (uint8_t)below(36) : TDB_WRITE;
	e->cpu = (uint16_t)(below(50) ? below(CPUS) : below(70000));
	e->arg = below(10) ? vector[below(sizeof(vector))] : (uint8_t)next();
	e->source = (uint8_t)below(12);
	e->flags = below(6) ? 0 : (uint8_t)next();
	e->rip = below(2) ? 0x1000 + below(8) : next();
	e->rsp = address();
	e->addr = e->kind == TDB_DELIVER && below(2) ? below(8) : address();
	e->value = address();
	e->code = below(3) ? below(8) : (uint32_t)next();
	e->cs = below(4) ? 8 : 0x33;
	e->ss = 0x10;
	e->rflags = (uint32_t)next();
	if (below(8))
		make_plausible(e);
}

/* Everything that searches, with any filter and from any place. */
static void search(tdb_replay *r, uint64_t position)
{
	static struct tdb_tally tally;
	static struct tdb_bucket buckets[64];
	struct tdb_range range[2] = { { 0x1000, 0x2000 }, { address() | 0x8000, UINT64_MAX } };
	struct tdb_filter filter[2] = { 0 };
	struct tdb_watch watch = { .lo = address(), .frame = below(64), .touch = next() };
	struct tdb_hit hits[8];
	uint32_t found[16];
	uint64_t on;

	for (int i = 0; i < 2; i++) {
		filter[i].kinds = next();
		filter[i].arg[below(4)] = next();
		filter[i].cpu[below(64)] = next();
		filter[i].range = range;
		filter[i].ranges = below(3);
		filter[i].sources = (uint32_t)next();
		filter[i].fields = (uint16_t)next();
		filter[i].flags = (uint8_t)(below(2) ? 0 : next());
		filter[i].tests = (uint8_t)next();
		filter[i].invert = (uint8_t)below(2);
	}
	watch.hi = watch.lo + below(70000);
	tdb_find_filter(r, filter, below(3), position, below(2) ? 1 : -1, 1 + below(1000));
	tdb_collect(r, filter, below(3), position, 1 + below(1000), found, below(17), &on);
	tdb_tally(r, position, 1 + below(1000), &tally);
	tdb_timeline(r, below(CPUS + 2), below(64), below(256), 1 + below(64), buckets);
	tdb_find_time(r, position, next(), 1 + below(1000));
	tdb_watch(r, &watch, 1 + below(1000), hits, below(9));
	while (tdb_seek_some(r, position, 1 << 20) > 0)
		;
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
		if (tdb_findings_raised(r) > tdb_get_findings(r, 0, findings, 64))
			abort();
		tdb_get_last_frame(r, frames);
		tdb_get_cpu(r, below(CPUS + 1), &cpu);
		tdb_get_tss(r, below(CPUS + 1), &tss);
		tdb_get_gate(r, below(CPUS + 1), below(300), &gate);
		tdb_get_stats(r, &stats);
		search(r, position);
	}
}

/* -Wl,--wrap=realloc: the one of so many calls from now on that fails; 0: none does. */
static uint32_t failing;

void *__real_realloc(void *old, size_t size);
void *__wrap_realloc(void *old, size_t size);
void *__wrap_realloc(void *old, size_t size)
{
	return failing && !--failing ? NULL : __real_realloc(old, size);
}

/* The forward pass with a journal of the frames that end, taken in pieces; the view, which goes about, adds nothing to it. */
static bool scan(tdb_replay *r, uint64_t count)
{
	struct tdb_life life[16];
	uint64_t ended = 0;
	uint32_t last = 0;
	struct tdb_stats stats;
	int64_t taken, n;

	tdb_journal(r, 1);
	do {
		if (!below(4))
			tdb_seek_some(r, next() % (count + 1), 1 + below(200));
		taken = tdb_scan(r, 1 + below(50));
		while ((n = tdb_take_ended(r, life, 1 + below(16))) > 0) {
			for (int64_t i = 0; i < n; i++) {
				const struct tdb_life *l = &life[i];

				if (l->end < last || l->end >= tdb_scanned(r) || l->frame.entry > l->end ||
				    l->settle >= TDB_SETTLE_COUNT || l->status > TDB_FRAME_MOVED)
					abort();
				if (l->overwritten != UINT32_MAX && (l->overwritten <= l->frame.entry || l->overwritten > l->end))
					abort();
				last = l->end;
			}
			ended += (uint64_t)n;
		}
	} while (taken > 0);
	if (taken < 0) {                 /* it stays so, and what was kept can be let go */
		if (taken != TDB_E_NOMEM || tdb_scan(r, 1) != taken)
			abort();
		return false;
	}
	tdb_get_stats(r, &stats);
	if (ended + stats.frames != stats.judged || tdb_get_unended(r, life, below(17)) != (int64_t)stats.frames)
		abort();
	tdb_journal(r, 0);
	return true;
}

static void run(const struct tdb_event *events, uint64_t count)
{
	static struct tdb_idt idt[2];
	static const uint8_t memory[64] = { 1, 2, 3 };
	struct tdb_tss tss[CPUS] = { 0 };
	struct tdb_cpu_layout cpu[CPUS] = { 0 };
	struct tdb_fred fred[CPUS] = { 0 };
	struct tdb_region region[6] = {
		{ .lo = 0x10e000, .hi = 0x110000, .slot = 1 }, { .lo = 0x10c000, .hi = 0x10e000, .slot = 2 },
		{ .lo = 0x10a000, .hi = 0x10c000, .slot = 3, .cpu = 1 }, { .lo = 0x107f00, .hi = 0x108000, .slot = 8 },
		{ .lo = 0x10d000, .hi = 0x10e800, .slot = 4, .cpu = 2 }, { .lo = 0x111000, .hi = 0x113000, .kind = TDB_REGION_USER },
	};
	struct tdb_memory mem = { 0x10dff4, sizeof(memory), memory };
	struct tdb_config cfg;
	struct tdb_layout layout = {
		.tss = tss, .idt = idt, .cpu = cpu, .region = region, .memory = &mem, .tss_count = CPUS, .idt_count = 2,
		.cpu_count = CPUS, .region_count = 6, .memory_count = 1, .fidelity = below(4), .fred = below(4) ? fred : NULL,
	};
	uint8_t bytes[256] = { 0 };
	tdb_replay *r;

	tdb_config_init(&cfg);
	cfg.snapshot_interval = 1 + below(40);
	cfg.max_snapshots = 2 + below(8);
	cfg.max_pages = 2 + below(30);
	cfg.max_frames = 1 + below(30);
	cfg.max_findings = below(20);
	cfg.iret_fault_unblocks = below(2);
	cfg.nmi_fail_blocks = below(2);
	for (int i = 0; i < 6; i++)
		region[i].assumed = below(2);
	for (int v = 0; v < 256; v++)
		idt[0].gate[v] = (struct tdb_gate){ .offset = 0x1000, .ist = (uint8_t)(v % 5), .type = v % 7 ? 0xe : 0xf,
						    .flags = v % 11 ? 3 : 1 };
	idt[1].base = 0x1000;
	for (int i = 0; i < CPUS; i++) {
		tss[i] = (struct tdb_tss){ .base = 0x1000u * (unsigned)i, .rsp = { 0x108000 },
					   .ist = { 0, 0x110000, 0x10e000, 0x10c000, 0x8600111111111111ull }, .known = 0x3ff01 };
		cpu[i] = (struct tdb_cpu_layout){ i, 0 };
		fred[i] = (struct tdb_fred){ .rsp = { 0x108000, 0x110000, 0x10e000, address() }, .stklvls = next(),
					     .config = 0x1000 | (next() & 0x7c0), .known = below(4) ? 0x3f : below(64),
					     .on = !below(3) };
	}
	if (tdb_open(&cfg, events, count, CPUS, bytes, sizeof(bytes), &layout, &r))
		abort();
	failing = below(8) ? 0 : 1 + below(8);
	if (scan(r, count) && !failing)
		look(r, count);
	failing = 0;
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

		/* Spread over all bits: xorshift takes long to part seeds that lie close together. */
		seed = ((uint64_t)(argc > 1 ? atol(argv[1]) : 1) * 1000003u + (uint64_t)i + 1) * 0x9e3779b97f4a7c15ull;
		count = below(400);
		for (uint32_t k = 0; k < count; k++) {
			make_event(&events[k]);
			if (k && !below(3))
				borrow(&events[k], &events[k - 1 - below(k < 20 ? k : 20)]);
		}
		run(events, count);
	}
	return 0;
}
#endif
