/* merge.c - a k-way merge of native events by time, with a heap of the runs. */
#include "merge.h"

#include <string.h>

#include "tdb.h"

static inline uint64_t head(const struct dec_run *r)
{
	return r->event->time > r->floor ? r->event->time : r->floor;
}

static inline int before(const struct dec_run *run, uint32_t a, uint32_t b)
{
	uint64_t x = head(&run[a]), y = head(&run[b]);

	return x < y || (x == y && a < b);
}

/* Put number n where it belongs in the heap, from place `at` on, which is empty. */
static void sift(const struct dec_run *run, uint32_t *heap, uint32_t size, uint32_t at, uint32_t n)
{
	uint32_t child;

	while ((child = 2 * at + 1) < size) {
		if (child + 1 < size && before(run, heap[child + 1], heap[child]))
			child++;
		if (!before(run, heap[child], n))
			break;
		heap[at] = heap[child];
		at = child;
	}
	heap[at] = n;
}

/* The run that comes next after the one at the top; UINT32_MAX: there is no other. */
static inline uint32_t second(const struct dec_run *run, const uint32_t *heap, uint32_t size)
{
	if (size < 2)
		return UINT32_MAX;
	return size > 2 && before(run, heap[2], heap[1]) ? heap[2] : heap[1];
}

/* How many events of the run that comes first come before the other run's next one (UINT32_MAX: none), within the limit;
 * at most `most`. */
static uint64_t burst(struct dec_run *run, uint32_t n, uint32_t other, uint64_t limit, uint64_t most)
{
	struct dec_run *r = &run[n];
	uint64_t key, floor = r->floor, i;

	if (other != UINT32_MAX) {
		uint64_t next = head(&run[other]) - (n > other);   /* not 0 then: n came first */

		limit = next < limit ? next : limit;
	}
	for (i = 0; i < most; i++) {
		key = r->event[i].time > floor ? r->event[i].time : floor;
		if (key > limit)
			break;
		floor = key;
	}
	r->floor = floor;
	return i;
}

int64_t dec_merge(struct dec_run *run, uint32_t runs, uint32_t *heap, uint64_t limit, struct tdb_event *out, uint64_t cap)
{
	uint64_t taken = 0;
	uint32_t size = 0;

	if ((runs && (!run || !heap)) || (cap && !out) || cap > INT64_MAX)
		return DEC_E_ARG;
	for (uint32_t n = 0; n < runs; n++) {
		if (run[n].count && !run[n].event)
			return DEC_E_ARG;
		if (run[n].count)
			heap[size++] = n;
	}
	for (uint32_t at = size / 2; at--;)
		sift(run, heap, size, at, heap[at]);
	while (size && taken < cap) {
		uint32_t top = heap[0];
		struct dec_run *r = &run[top];
		uint64_t most = r->count < cap - taken ? r->count : cap - taken;
		uint64_t n = burst(run, top, second(run, heap, size), limit, most);

		if (!n)
			break;                 /* the next of all is beyond the limit */
		memcpy(out + taken, r->event, n * sizeof(*out));
		taken += n;
		r->event += n;
		r->count -= n;
		if (r->count)
			sift(run, heap, size, 0, top);
		else if (--size)
			sift(run, heap, size, 0, heap[size]);
	}
	return (int64_t)taken;
}
