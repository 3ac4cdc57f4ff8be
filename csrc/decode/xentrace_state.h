/* xentrace_state.h - the state of the xentrace decoder. Private to csrc/. */
#ifndef TRACEDBG_XENTRACE_STATE_H
#define TRACEDBG_XENTRACE_STATE_H

#include <stdbool.h>
#include <string.h>

#include "merge.h"
#include "tdb.h"
#include "xentrace.h"

enum {
	XT_TSC_BIT = 1u << 31,
	XT_EVENT_MASK = 0x0fffffff,
	XT_SLOTS = 256,          /* of the hash of event ids; a power of two, well more than XT_RECORDS */
	XT_IRQS = 1 << 16,
	XT_PIECE = 1 << 14,      /* events given out at a time */
	XT_ROOM = 3              /* events that must fit in before a record is taken: it makes two at most */
};

/* Places are numbers of the CPU's own events from 1 on, 0: none. */
struct xt_cpu {
	uint64_t tsc;            /* of the last record that has one */
	uint64_t made;           /* events so far */
	uint64_t entry, exit;    /* the last VM entry, the last VM exit */
	uint64_t stgi;           /* the exit after which GIF was said to be set */
	uint64_t intr;           /* the last delivery that VMX acknowledged by an exit and that is not recorded as handled yet */
	uint64_t irq;            /* the last delivery of an interrupt that was recorded as handled */
	uint32_t exit_at;        /* the last VM exit as held: its index + 1, 0: it is written already */
	uint32_t old;            /* the CPU's window of the round before: its index + 1, 0 none */
	uint8_t intr_vector;     /* of `intr` */
	bool tsc_known;
};

struct xt_window {           /* its events that are held */
	uint64_t highest;        /* of their times */
	uint32_t first, count;
	uint32_t cpu;
	uint32_t early;          /* how many of them go with the round before */
};

enum xt_phase { XT_HEADER, XT_IN_WINDOW, XT_CUT, XT_SKIP, XT_END };

struct xt {
	struct xt_format format;
	struct xt_told told;
	struct tdb_event *event; /* what is held: the windows, one after the other */
	uint32_t cap, used;
	uint64_t offset;         /* in the input, of the next byte */
	uint64_t left;           /* bytes of the window, or to skip, that are still to come */
	enum xt_phase phase;
	bool draining, flushing; /* events are being given out; all that is held, not a round */
	bool merging;            /* they are of several CPUs */
	uint8_t vendor;
	uint32_t olds, news;     /* windows of the round before, and of this one */
	uint32_t runs;           /* to be given out */
	uint32_t generation;     /* of `vector`; those of earlier ones are forgotten */
	struct xt_window *now;   /* the last window */
	uint64_t text_end;       /* offset behind the last text that is used */
	uint64_t text_at[XT_TEXTS];       /* offset + 1, 0: not used yet */
	uint8_t slot[XT_SLOTS];           /* number of a record + 1 */
	uint32_t vector[XT_IRQS];         /* generation 31:8, vector 7:0 */
	struct xt_cpu cpu[XT_CPUS];
	struct xt_window window[2 * XT_CPUS];
	struct dec_run run[3 * XT_CPUS];
	uint32_t heap[3 * XT_CPUS];
	struct tdb_event piece[XT_PIECE]; /* merged */
};

enum xt_stop {               /* why the loop over the records ended */
	XT_STARVED,              /* the next one is not all there, or there is none */
	XT_FULL,                 /* too many events are held */
	XT_WINDOW                /* the header of a window */
};

static inline uint32_t xt_word(const uint8_t *p)
{
	uint32_t w;

	memcpy(&w, p, sizeof(w));
	return w;
}

static inline uint32_t xt_bytes(uint32_t header)
{
	return 4 + (header >> 28 & 7) * 4 + (header >> 31) * 8;
}

static inline bool xt_full(const struct xt *x)
{
	return x->used + XT_ROOM > x->cap;
}

static inline uint32_t xt_hash(uint32_t event)
{
	return event * 0x9e3779b1u >> 24;
}

/* Take records of the window's CPU from size bytes; returns the bytes taken. */
uint64_t xt_records(struct xt *x, const uint8_t *data, uint64_t size, enum xt_stop *ret);
/* Say that records of the window's CPU are missing, nobody knows how many. */
void xt_cut(struct xt *x);

/* Begin a window. */
void xt_begin(struct xt *x, uint32_t cpu);
/* Give out the round before and what of this one is no younger; then this one is the round before. */
void xt_round(struct xt *x);
/* Give out all that is held: at the end, or because it is too much. */
void xt_flush(struct xt *x);
void xt_overfull(struct xt *x);
/* The next events that are given out; false: that was all of them. */
bool xt_drain(struct xt *x, const struct tdb_event **ret, uint64_t *count);

#endif
