/* search.c - find the next or previous event of a kind, in C because the trace may be long. */
#include "core.h"

int64_t tdb_find(const tdb_replay *r, uint64_t from, int dir, uint64_t kind_mask, int vector, int cpu, uint64_t max)
{
	uint64_t i = from;

	if (from >= r->in.count)
		return TDB_E_RANGE;
	for (; max; max--) {
		const struct tdb_event *e = &r->in.events[i];

		if (e->kind >= TDB_DELIVER && e->kind <= TDB_MARK && kind_mask >> (e->kind - 1) & 1 &&
		    (vector < 0 || (e->known & TDB_K_ARG && e->arg == vector)) &&
		    (cpu < 0 || (e->known & TDB_K_CPU && e->cpu == cpu)))
			return (int64_t)i;
		if (dir > 0 ? ++i == r->in.count : i-- == 0)
			break;
	}
	return TDB_E_RANGE;
}
