/* pt_merge.c - events of several streams into one order. */
#include <string.h>

#include "pt.h"
#include "tdb.h"

/* Time that orders the next event of a stream: those without a time, or with an earlier one, stay behind the one before. */
static uint64_t key(struct pt_run *r)
{
	struct tdb_event e;

	memcpy(&e, (const char *)r->events + r->at * sizeof(e), sizeof(e));
	return e.known & TDB_K_TIME && e.time > r->key ? e.time : r->key;
}

int64_t pt_merge(struct pt_run *run, uint32_t runs, uint64_t limit, void *ret, uint64_t cap)
{
	uint64_t n = 0;

	if (!run || !runs || !ret)
		return DEC_E_ARG;
	while (n < cap) {
		struct pt_run *best = NULL;
		uint64_t least = 0, second = limit;

		for (uint32_t i = 0; i < runs; i++) {
			struct pt_run *r = &run[i];
			uint64_t k;

			if (r->at >= r->count) {
				if (r->open)
					return (int64_t)n;
				continue;
			}
			k = key(r);
			if (!best || k < least) {
				if (best && least < second)
					second = least;
				best = r;
				least = k;
			} else if (k < second) {
				second = k;
			}
		}
		if (!best || least > limit)
			break;
		/* Of equal ones the first stream's come first; enough is taken to make the search cheap. */
		do {
			best->key = least;
			memcpy((char *)ret + n++ * sizeof(struct tdb_event), (const char *)best->events + best->at++ * sizeof(struct tdb_event),
			       sizeof(struct tdb_event));
			if (best->at >= best->count)
				break;
			least = key(best);
		} while (n < cap && (least < second || (least == best->key && least <= limit)));
	}
	return (int64_t)n;
}
