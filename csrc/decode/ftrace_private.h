/*
 * ftrace_private.h - what the two halves of the decoder share: ftrace.c (pages, streams), ftrace_record.c (records).
 */
#ifndef TRACEDBG_FTRACE_PRIVATE_H
#define TRACEDBG_FTRACE_PRIVATE_H

#include <string.h>

#include "ftrace.h"
#include "tdb.h"

/* x86 alone makes these pages and reads them here: little-endian, unaligned. */
static inline uint32_t get32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static inline uint64_t get64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return v;
}

static inline void ftr_complete(struct tdb_event *e, uint64_t value, uint32_t code)
{
	e->value = value;
	e->code = code;
	e->flags |= TDB_F_BYTES;
	e->known |= TDB_K_VALUE | TDB_K_CODE;
}

static inline uint32_t ftr_answer_slot(const struct ftr_answer *a)
{
	return (uint32_t)(((a->key[0] ^ a->key[1] * 31 ^ a->point) * 0x9e3779b97f4a7c15ULL) >> 56);
}

/* Records were lost on a CPU: what it knew is gone.  A vCPU may have run on it.  lost UINT64_MAX: nobody knows how many. */
void ftr_gap(struct ftr_state *s, struct ftr_stream *st, uint64_t lost);
/* Write what was held back for a VM exit. */
void ftr_release(struct ftr_state *s, struct ftr_stream *st);
/* A record of a tracepoint: puts at most three events into the queue; whether the caller is to complete the last one. */
int ftr_record(struct ftr_state *s, struct ftr_stream *st, const uint8_t *p, uint32_t size);

#endif
