/*
 * merge.h - runs of native events, each in the order of its time, into one (tracedbg._decode).
 *
 * For sources that keep a buffer for each CPU.  Who streams gives the runs that it has and, as the limit, the time up to
 * which nothing can come any more; what is taken is gone from the runs, and a run is filled again when it is empty.
 */
#ifndef TRACEDBG_MERGE_H
#define TRACEDBG_MERGE_H

#include "decode.h"

/* cffi: begin */
struct dec_run {
	const struct tdb_event *event;   /* what is left of it */
	uint64_t count;
	uint64_t floor;   /* an event counts as no older than this, which is then the time of the one before it */
};

/** Take at most cap events, in the order of their time, from the runs to out, as long as their time is <= limit.  Equal
 *  times: those of the run that comes first; the events of a run keep their order whatever their times are.  heap: room for
 *  as many numbers as there are runs.  Returns how many were taken.  Errors: ARG. */
int64_t dec_merge(struct dec_run *run, uint32_t runs, uint32_t *heap, uint64_t limit, struct tdb_event *out, uint64_t cap);
/* cffi: end */

#endif
