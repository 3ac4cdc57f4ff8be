/* search.c - find, collect and count events, in C because the trace may be long.
 *
 * All of it reads the events only: neither the scan nor the view moves. */
#include "core.h"

static inline unsigned in_set(const uint64_t *set, unsigned bit)
{
	return set[bit >> 6] >> (bit & 63) & 1;
}

/* Whether one of the ranges has a byte of [lo, last]. */
static bool in_ranges(const struct tdb_filter *f, uint64_t lo, uint64_t last)
{
	uint32_t a = 0, b = f->ranges;

	while (a < b) {                        /* the first range that does not end before lo */
		uint32_t middle = a + (b - a) / 2;

		if (f->range[middle].last < lo)
			a = middle + 1;
		else
			b = middle;
	}
	return a < f->ranges && f->range[a].lo <= last;
}

/* The same of one address; nearly all lie outside of all ranges. */
static inline bool in_range(const struct tdb_filter *f, uint64_t addr)
{
	uint64_t lo = f->range[0].lo;

	return unlikely(addr - lo <= f->range[f->ranges - 1].last - lo) && in_ranges(f, addr, addr);
}

/* The fields that hold addresses: tdb.h says at enum tdb_kind and enum tdb_event_flag which hold something else. */
static bool addr_matches(const struct tdb_filter *f, const struct tdb_event *e)
{
	uint64_t length = 1, last;

	if (e->kind == TDB_DELIVER && e->flags & TDB_F_FAILED)
		return false;
	if (e->kind == TDB_WRITE || e->kind == TDB_READ)
		length = e->flags & TDB_F_BYTES ? e->code : e->known & TDB_K_ARG ? e->arg : 1;
	last = e->addr + (length ? length - 1 : 0);
	return in_ranges(f, e->addr, last < e->addr ? UINT64_MAX : last);
}

static bool address_matches(const struct tdb_filter *f, const struct tdb_event *e)
{
	uint32_t fields = f->fields & e->known;
	uint64_t lo, span, reach = UINT32_MAX;     /* of the longest access */

	if (!f->ranges)
		return false;
	if (fields & TDB_K_RIP && in_range(f, e->rip))
		return true;
	if (fields & TDB_K_RSP && in_range(f, e->rsp))
		return true;
	lo = f->range[0].lo;
	span = f->range[f->ranges - 1].last - lo;
	if (fields & TDB_K_ADDR && unlikely(e->addr - lo + reach <= span + reach || span + reach < span) && addr_matches(f, e))
		return true;
	return fields & TDB_K_VALUE && in_range(f, e->value) && !(e->flags & TDB_F_BYTES) && e->kind != TDB_GAP;
}

static inline unsigned knows(const struct tdb_event *e, enum tdb_known field)
{
	return (e->known & field) != 0;
}

/* Without branches that depend on the event, as kinds and vectors come in no order that could be predicted. */
static inline bool passes(const struct tdb_filter *f, const struct tdb_event *e)
{
	uint32_t tests = f->tests;
	unsigned ok = 1;

	if (tests & TDB_FT_KIND) {
		unsigned kind = e->kind - 1u;

		ok &= (kind < TDB_MARK) & (unsigned)(f->kinds >> (kind & 63));
	}
	if (tests & TDB_FT_ARG)
		ok &= knows(e, TDB_K_ARG) & in_set(f->arg, e->arg);
	if (tests & TDB_FT_SOURCE) {
		unsigned known = knows(e, TDB_K_SOURCE) & (e->source <= TDB_SRC_SYSCALL);

		ok &= f->sources >> (e->source & (0u - known) & 31) & 1;
	}
	if (tests & TDB_FT_CPU)
		ok &= knows(e, TDB_K_CPU) & (e->cpu < 4096) & in_set(f->cpu, e->cpu & 4095);
	if (tests & TDB_FT_FLAGS)
		ok &= (e->flags & f->flags) == f->flags;
	if (tests & TDB_FT_ADDRESS && ok)
		ok = address_matches(f, e);
	return ok;
}

static inline bool matches(const struct tdb_filter *f, uint32_t filters, const struct tdb_event *e)
{
	for (uint32_t i = 0; i < filters; i++)
		if (passes(&f[i], e) == (f[i].invert != 0))
			return false;
	return true;
}

static bool valid(const struct tdb_filter *f, uint32_t filters)
{
	if (filters > TDB_MAX_FILTERS || (!f && filters))
		return false;
	for (uint32_t i = 0; i < filters; i++) {
		if (!f[i].range && f[i].ranges)
			return false;
		for (uint32_t n = 0; n < f[i].ranges; n++)
			if (f[i].range[n].lo > f[i].range[n].last || (n && f[i].range[n].lo <= f[i].range[n - 1].last))
				return false;
	}
	return true;
}

int64_t tdb_find_filter(const tdb_replay *r, const struct tdb_filter *filter, uint32_t filters, uint64_t from, int dir,
			uint64_t max)
{
	const struct tdb_event *e = r->in.events;

	if (!valid(filter, filters))
		return TDB_E_ARG;
	if (from >= r->in.count)
		return TDB_E_RANGE;
	if (dir > 0) {
		uint64_t end = max < r->in.count - from ? from + max : r->in.count;

		for (uint64_t i = from; i < end; i++)
			if (matches(filter, filters, &e[i]))
				return (int64_t)i;
	} else {
		uint64_t end = max <= from ? from + 1 - max : 0;

		for (uint64_t i = from + 1; i-- > end;)
			if (matches(filter, filters, &e[i]))
				return (int64_t)i;
	}
	return TDB_E_RANGE;
}

int64_t tdb_collect(const tdb_replay *r, const struct tdb_filter *filter, uint32_t filters, uint64_t from, uint64_t max,
		    uint32_t *ret, uint64_t cap, uint64_t *next)
{
	const struct tdb_event *e = r->in.events;
	uint64_t i, n = 0, end;

	if (!valid(filter, filters) || !next || (!ret && cap))
		return TDB_E_ARG;
	if (from > r->in.count)
		return TDB_E_RANGE;
	end = max < r->in.count - from ? from + max : r->in.count;
	for (i = from; i < end && n < cap; i++) {
		ret[n] = (uint32_t)i;          /* tdb_open() takes no more than fit */
		n += matches(filter, filters, &e[i]);
	}
	*next = i;
	return (int64_t)n;
}

int64_t tdb_tally(const tdb_replay *r, uint64_t from, uint64_t max, struct tdb_tally *ret)
{
	uint64_t end;

	if (!ret)
		return TDB_E_ARG;
	if (from > r->in.count)
		return TDB_E_RANGE;
	end = max < r->in.count - from ? from + max : r->in.count;
	for (uint64_t i = from; i < end; i++) {
		const struct tdb_event *e = &r->in.events[i];

		if (e->known & TDB_K_CPU && e->cpu < 4096)
			ret->cpu[e->cpu]++;
		if (e->kind != TDB_DELIVER)
			continue;
		ret->deliveries++;
		ret->source[e->known & TDB_K_SOURCE && e->source <= TDB_SRC_SYSCALL ? e->source : TDB_SRC_UNKNOWN]++;
		if (e->known & TDB_K_ARG)
			ret->vector[e->arg]++;
	}
	return (int64_t)(end - from);
}
