/* replay.c - the handle: opening, the forward scan, seeking. */
#include <stdlib.h>

#include "core.h"

#define ABI 8

int tdb_abi(void)
{
	return ABI;
}

const char *tdb_strerror(int status)
{
	switch ((enum tdb_status)status) {
	case TDB_OK: return "success";
	case TDB_E_NOMEM: return "out of memory";
	case TDB_E_ARG: return "invalid argument";
	case TDB_E_RANGE: return "outside the trace";
	case TDB_E_LIMIT: return "more events than can be numbered";
	}
	return status > 0 ? "success" : "unknown status";
}

void tdb_config_init(struct tdb_config *ret)
{
	*ret = (struct tdb_config){
		.size = sizeof(*ret), .snapshot_interval = 4096, .max_snapshots = 512, .max_pages = 16384,
		.max_frames = 65536, .max_findings = 65536, .iret_fault_unblocks = 1, .nmi_fail_blocks = 1,
		.max_bytes = 1ull << 30,
	};
}

static int compare_stacks(const void *a, const void *b)
{
	const struct tdb_stack *x = a, *y = b;

	if (x->hi != y->hi)
		return x->hi < y->hi ? -1 : 1;
	if (x->lo != y->lo)
		return x->lo < y->lo ? -1 : 1;
	return x->frames < y->frames ? -1 : x->frames > y->frames;  /* the place in the layout, while sorting */
}

static int compare_regions(const void *a, const void *b)
{
	const struct tdb_region *x = a, *y = b;

	return x->lo < y->lo ? -1 : x->lo > y->lo;
}

/* Sorted and disjoint, for a binary search. */
static void merge_user(struct inputs *in)
{
	uint32_t n = 0;

	qsort(in->user, in->user_count, sizeof(*in->user), compare_regions);
	for (uint32_t i = 0; i < in->user_count; i++) {
		if (n && in->user[i].lo <= in->user[n - 1].hi) {
			if (in->user[i].hi > in->user[n - 1].hi)
				in->user[n - 1].hi = in->user[i].hi;
		} else {
			in->user[n++] = in->user[i];
		}
	}
	in->user_count = n;
}

static int take_regions(struct inputs *in, const struct tdb_layout *l)
{
	in->stack = calloc(l->region_count + 1, sizeof(*in->stack));
	in->stack_top = calloc(l->region_count + 1, sizeof(*in->stack_top));
	in->user = calloc(l->region_count + 1, sizeof(*in->user));
	in->stack_cache = calloc(STACK_CACHE, sizeof(*in->stack_cache));
	if (!in->stack || !in->stack_top || !in->user || !in->stack_cache)
		return TDB_E_NOMEM;
	for (uint32_t i = 0; i < l->region_count; i++) {
		const struct tdb_region *r = &l->region[i];

		if (r->lo >= r->hi || r->slot > 8 || r->kind > TDB_REGION_READS)
			return TDB_E_ARG;
		if (r->kind == TDB_REGION_USER)
			in->user[in->user_count++] = *r;
		if (r->kind == TDB_REGION_STACK)
			in->stack[in->stack_count++] = (struct tdb_stack){
				.lo = r->lo, .hi = r->hi, .cpu = r->cpu, .slot = r->slot,
				.flags = TDB_STACK_NAMED | (r->assumed ? TDB_STACK_ASSUMED : 0),
				.frames = i };
	}
	merge_user(in);
	qsort(in->stack, in->stack_count, sizeof(*in->stack), compare_stacks);
	for (uint32_t i = 0; i < in->stack_count; i++)
		in->stack_top[i] = in->stack[i].hi;
	return TDB_OK;
}

static bool valid(const struct tdb_config *cfg, const struct tdb_event *events, uint64_t count, uint32_t cpus,
		  const uint8_t *bytes, uint64_t bytes_size, const struct tdb_layout *l)
{
	if (!cfg || cfg->size != sizeof(*cfg) || (!events && count) || !cpus || cpus > 4096 || (!bytes && bytes_size) || !l)
		return false;
	if (!cfg->snapshot_interval || cfg->max_snapshots < 2 || !cfg->max_pages || !cfg->max_frames)
		return false;
	if ((!l->tss && l->tss_count) || (!l->idt && l->idt_count) || (!l->cpu && l->cpu_count) ||
	    (!l->region && l->region_count) || (!l->memory && l->memory_count) || l->cpu_count > cpus)
		return false;
	for (uint32_t i = 0; i < l->cpu_count; i++)
		if (l->cpu[i].tss < -1 || l->cpu[i].tss >= (int64_t)l->tss_count || l->cpu[i].idt < -1 ||
		    l->cpu[i].idt >= (int64_t)l->idt_count)
			return false;
	for (uint32_t i = 0; i < l->idt_count; i++)
		for (uint32_t v = 0; v < 256; v++)
			if (l->idt[i].gate[v].ist > 7)
				return false;
	for (uint32_t i = 0; i < l->memory_count; i++)
		if ((!l->memory[i].bytes && l->memory[i].length) || (l->memory[i].length && l->memory[i].addr + (l->memory[i].length - 1) < l->memory[i].addr))
			return false;
	return true;
}

int tdb_open(const struct tdb_config *cfg, const struct tdb_event *events, uint64_t count, uint32_t cpus,
	     const uint8_t *bytes, uint64_t bytes_size, const struct tdb_layout *layout, tdb_replay **ret)
{
	tdb_replay *r;
	int status;

	if (!ret || !valid(cfg, events, count, cpus, bytes, bytes_size, layout))
		return TDB_E_ARG;
	if (count >= WRITER_SPLIT)
		return TDB_E_LIMIT;
	r = calloc(1, sizeof(*r));
	if (!r)
		return TDB_E_NOMEM;
	r->in = (struct inputs){
		.cfg = *cfg, .events = events, .count = count, .bytes = bytes, .bytes_size = bytes_size, .cpus = cpus,
		.fidelity = layout->fidelity, .tss_count = layout->tss_count, .idt_count = layout->idt_count,
	};
	r->findings.limit = cfg->max_findings;
	status = take_regions(&r->in, layout);
	if (!status)
		status = snapshots_init(&r->snapshots, cfg);
	if (!status)
		status = timeline_init(&r->timeline, cpus);
	if (!status)
		status = machine_init(&r->scan, &r->in, layout, &r->page_bytes);
	if (!status)
		status = machine_init(&r->view, &r->in, layout, &r->page_bytes);
	if (!status) {
		r->scan.sink = &r->findings;
		snapshots_take(&r->snapshots, &r->scan);
		if (!r->snapshots.count)
			status = TDB_E_NOMEM;          /* the one at 0 is what seeking back falls back on */
	}
	if (status) {
		tdb_close(r);
		return status;
	}
	*ret = r;
	return TDB_OK;
}

void tdb_close(tdb_replay *r)
{
	if (!r)
		return;
	if (r->scan.in)
		machine_deinit(&r->scan);
	if (r->view.in)
		machine_deinit(&r->view);
	snapshots_deinit(&r->snapshots);
	timeline_deinit(&r->timeline);
	free(r->findings.item);
	free(r->journal.item);
	free(r->in.stack);
	free(r->in.stack_top);
	free(r->in.user);
	free(r->in.stack_cache);
	free(r);
}

int tdb_extend(tdb_replay *r, const struct tdb_event *events, uint64_t count)
{
	if ((!events && count) || count < r->in.count)
		return TDB_E_ARG;
	if (count >= WRITER_SPLIT)
		return TDB_E_LIMIT;
	if (r->in.count && events != r->in.events && memcmp(events, r->in.events, r->in.count * sizeof(*events)))
		return TDB_E_ARG;
	r->in.events = events;
	r->in.count = count;
	return TDB_OK;
}

static int scan_to(tdb_replay *r, uint64_t stop)
{
	struct machine *m = &r->scan;
	struct timeline *t = &r->timeline;

	while (m->position < stop) {
		const struct tdb_event *e = &r->in.events[m->position];
		bool begins = m->position == t->end;
		int status = machine_apply(m);

		if (unlikely(status))
			return status;
		if (unlikely(begins))
			timeline_begin(t, m);
		if (e->kind == TDB_DELIVER || e->kind == TDB_GAP || unlikely(m->finding_count != t->raised)) {
			timeline_note(t, m, e);
			if (unlikely(r->findings.status))
				return r->findings.status;
		}
	}
	return TDB_OK;
}

int64_t tdb_scan(tdb_replay *r, uint64_t max)
{
	uint64_t left = r->in.count - r->scan.position, take = max < left ? max : left;
	uint64_t end = r->scan.position + take;

	if (r->broken)
		return r->broken;
	while (r->scan.position < end) {
		uint64_t interval = r->snapshots.interval, stop = (r->scan.position / interval + 1) * interval;

		r->broken = scan_to(r, stop < end ? stop : end);
		if (!r->broken)
			r->broken = r->journal.status;
		if (r->broken)
			return r->broken;
		if (r->scan.position == stop)
			snapshots_take(&r->snapshots, &r->scan);
	}
	return (int64_t)take;
}

uint64_t tdb_scanned(const tdb_replay *r)
{
	return r->scan.position;
}

int64_t tdb_seek_some(tdb_replay *r, uint64_t position, uint64_t max)
{
	int status;

	if (position > r->in.count)
		return TDB_E_RANGE;
	if (r->broken)
		return r->broken;
	if (position > r->scan.position) {                 /* the view never runs ahead of the scan: findings live there */
		uint64_t ahead = position - r->scan.position;
		int64_t done = tdb_scan(r, ahead < max ? ahead : max);

		if (done < 0)
			return done;
		max -= (uint64_t)done;
		if (!max || position > r->scan.position)
			return (int64_t)(position - r->scan.position + 1);
	}
	status = snapshots_restore(&r->snapshots, &r->view, position);
	while (!status && r->view.position < position && max) {
		status = machine_apply(&r->view);
		max--;
	}
	if (status) {
		r->broken = status;
		return status;
	}
	return (int64_t)(position - r->view.position);
}

uint64_t tdb_position(const tdb_replay *r)
{
	return r->view.position;
}
