/*
 * timeline.c - a summary of the scan by CPU and stretches of events, for a picture of the whole trace.
 *
 * A cell is a stretch of 2^shift events on one CPU.  The cells cover one event each at first; when they are all used, pairs
 * are merged and the width doubles, so that the length of the trace need not be known.
 */
#include <stdlib.h>

#include "core.h"

#define MOST_CELLS 2048u        /* a CPU's; a power of two */
#define LEAST_CELLS 64u
#define CELLS (1u << 17)        /* of all CPUs, as long as each has LEAST_CELLS */

static struct tdb_bucket *stretch(const struct timeline *t, uint64_t number) { return t->cell + number * t->columns; }

int timeline_init(struct timeline *t, uint32_t cpus)
{
	*t = (struct timeline){ .columns = cpus + 1, .cells = MOST_CELLS };
	while (t->cells > LEAST_CELLS && (uint64_t)t->cells * t->columns > CELLS)
		t->cells /= 2;
	t->cell = calloc((size_t)t->cells * t->columns, sizeof(*t->cell));
	return t->cell ? TDB_OK : TDB_E_NOMEM;
}

void timeline_deinit(struct timeline *t)
{
	free(t->cell);
	t->cell = NULL;
}

static void merge(struct tdb_bucket *to, const struct tdb_bucket *from)
{
	to->deliveries += from->deliveries;
	to->findings += from->findings;
	to->gaps += from->gaps;
	if (from->depth > to->depth)
		to->depth = from->depth;
}

static void halve(struct timeline *t)
{
	uint32_t half = t->cells / 2;

	for (uint32_t n = 0; n < half; n++) {
		for (uint32_t c = 0; c < t->columns; c++) {
			struct tdb_bucket cell = stretch(t, 2 * n)[c];

			merge(&cell, &stretch(t, 2 * n + 1)[c]);
			stretch(t, n)[c] = cell;
		}
	}
	memset(stretch(t, half), 0, (size_t)half * t->columns * sizeof(*t->cell));
	t->shift++;
}

void timeline_begin(struct timeline *t, const struct machine *m)
{
	uint64_t index = m->position - 1;

	while (index >> t->shift >= t->cells)
		halve(t);
	t->now = stretch(t, index >> t->shift);
	t->end = ((index >> t->shift) + 1) << t->shift;
	for (uint32_t c = 0; c + 1 < t->columns; c++)
		if (m->mine[c].count > t->now[c].depth)
			t->now[c].depth = m->mine[c].count;
}

void timeline_note(struct timeline *t, const struct machine *m, const struct tdb_event *e)
{
	uint32_t none = t->columns - 1, cpu = e->known & TDB_K_CPU && e->cpu < none ? e->cpu : none;

	if (e->kind == TDB_DELIVER && cpu != none) {
		t->now[cpu].deliveries++;
		if (m->mine[cpu].count > t->now[cpu].depth)
			t->now[cpu].depth = m->mine[cpu].count;
	}
	if (e->kind == TDB_GAP && (cpu != none || !(e->known & TDB_K_CPU)))
		t->now[cpu].gaps++;
	for (; t->raised < m->finding_count; t->raised++) {
		const struct tdb_finding *f = t->raised < m->sink->count ? &m->sink->item[t->raised] : NULL;
		uint32_t of = !f ? cpu : f->cpu < none ? f->cpu : none;
		uint64_t event = f && f->event < m->position ? f->event : m->position - 1;

		stretch(t, event >> t->shift)[of].findings++;
	}
}

int64_t tdb_timeline(const tdb_replay *r, uint32_t cpu, uint64_t first, uint64_t count, uint32_t buckets,
		     struct tdb_bucket *ret)
{
	const struct timeline *t = &r->timeline;
	uint32_t none = t->columns - 1;
	uint64_t last;

	if (!buckets || buckets > count)
		return TDB_E_ARG;
	if ((cpu >= none && cpu != NONE) || first > r->in.count || count > r->in.count - first)
		return TDB_E_RANGE;
	memset(ret, 0, buckets * sizeof(*ret));
	last = first + count < r->scan.position ? first + count : r->scan.position;
	for (uint64_t n = first >> t->shift; n << t->shift < last; n++) {
		uint64_t lo = n << t->shift, hi = lo + (1ull << t->shift);
		struct tdb_bucket sum = stretch(t, n)[none];
		uint64_t from, to;

		for (uint32_t c = cpu == NONE ? 0 : cpu; c < (cpu == NONE ? none : cpu + 1); c++)
			merge(&sum, &stretch(t, n)[c]);
		from = (lo > first ? lo - first : 0) * buckets / count;
		to = ((hi < last ? hi : last) - first - 1) * buckets / count;
		merge(&ret[from], &sum);
		for (uint64_t b = from + 1; b <= to; b++)
			if (sum.depth > ret[b].depth)
				ret[b].depth = sum.depth;
	}
	return (int64_t)1 << t->shift;
}
