/*
 * ftrace.h - records of Linux's trace ring buffer (the pages in a trace.dat) as native events.
 *
 * A stream is the pages of one CPU in one buffer.  ftr_run() walks all streams at once and writes their events in the order
 * of their times.  What a tracepoint becomes, and at which offset its fields lie, is in a table of the caller.
 */
#ifndef TRACEDBG_FTRACE_H
#define TRACEDBG_FTRACE_H

#include "decode.h"

/* cffi: begin */
enum {
	FTR_MAX_STREAMS = 8192,
	FTR_MAX_CPUS = 4096,     /* native ones: those of the host, then the vCPUs */
	FTR_MAX_POINTS = 65536,
	FTR_FIELDS = 8,
	FTR_QUEUE = 32,
	FTR_HANDLERS = 8,
	FTR_DAMAGES = 20,
	FTR_NONE = 0xffffffff
};

enum ftr_what {          /* what becomes of a tracepoint's records */
	FTR_SKIP = 0,        /* counted */
	FTR_EVENT = 1,       /* the event of the table, with the fields put where they say */
	FTR_ASK = 2,         /* the event; the caller completes it, for records with equal fields 0 and 1 (if there are) once */
	FTR_IRQ_ENTRY = 3,   /* the same for the first handler of an interrupt; fields: IRQ, place of the handler's name */
	FTR_IRQ_EXIT = 4,    /* nothing; fields: IRQ */
	FTR_KVM_ENTRY = 5,   /* fields: enum ftr_entry_field */
	FTR_KVM_EXIT = 6,    /* fields: enum ftr_exit_field */
	FTR_KVM_REQUEST = 7, /* the event, of the vCPU whose thread runs; fields: vector, has an error code, error code */
	FTR_KVM_ACCEPT = 8   /* fields: KVM's number of the vCPU, delivery mode, vector */
};

enum ftr_entry_field { FTR_N_VCPU = 0, FTR_N_RIP = 1, FTR_N_INTR = 2, FTR_N_CODE = 3 };

enum ftr_exit_field { FTR_X_RIP = 0, FTR_X_REASON = 1, FTR_X_ISA = 2, FTR_X_INFO2 = 3, FTR_X_INTR = 4 };

enum ftr_to {            /* where FTR_EVENT puts a field */
	FTR_TO_NOTHING = 0, FTR_TO_RIP = 1, FTR_TO_RSP = 2, FTR_TO_ADDR = 3, FTR_TO_VALUE = 4, FTR_TO_CODE = 5, FTR_TO_ARG = 6
};

enum ftr_count {
	FTR_C_RECORDS = 0,       /* records of tracepoints */
	FTR_C_ODD = 1,           /* records that are shorter than their format, or whose vector is none */
	FTR_C_UNKNOWN = 2,       /* records of tracepoints that are not in the table */
	FTR_C_GAPS = 3,          /* places where records were lost */
	FTR_C_LOST = 4,          /* records lost there, as far as counted */
	FTR_C_DAMAGED = 5,       /* pages that are not readable to their end */
	FTR_C_SHARED = 6,        /* further handlers of one interrupt */
	FTR_C_UNDELIVERED = 7,   /* injections that the VM exit after them shows as not delivered */
	FTR_C_UNSETTLED = 8,     /* injections without that VM exit */
	FTR_C_NO_VCPU = 9,       /* requests to a vCPU that nothing tells, and vCPUs beyond the CPUs that a trace can have */
	FTR_COUNTS = 10
};

struct ftr_field { uint16_t at; uint8_t size; uint8_t to; };   /* size 1, 2, 4, 8; 0: there is no such field */

struct ftr_point {           /* a tracepoint; number 0 stands for those that are not known */
	uint64_t event[8];       /* struct tdb_event, as far as it is the same for every record */
	uint64_t count;          /* its records */
	uint8_t what;            /* enum ftr_what */
	uint8_t reserved[7];
	struct ftr_field field[8];
};

struct ftr_stream {
	const uint8_t *data;     /* whole pages; the caller's, until it gives others */
	uint64_t size;           /* bytes of it */
	uint64_t at;             /* of the next page in it */
	uint64_t base;           /* bytes of the stream before it */
	uint64_t time;
	uint64_t records;
	uint64_t handled;        /* `records` at the last FTR_IRQ_EXIT */
	const uint8_t *next;     /* in the page at hand */
	const uint8_t *end;
	uint64_t queue[32][8];   /* events that are not written yet; FTR_QUEUE */
	uint32_t head, queued;
	uint32_t held;           /* the queued event from which on nothing is written yet, FTR_NONE: none */
	uint32_t irq;            /* of the interrupt whose handlers run */
	uint32_t handler[8];     /* hashes of the names of those that ran; FTR_HANDLERS */
	uint32_t handlers;
	uint32_t exited;         /* the IRQ of the last FTR_IRQ_EXIT */
	uint32_t page_size;
	uint16_t cpu;
	uint8_t last;            /* no pages come after `data` */
	uint8_t cut;             /* with it: but there were more */
	uint8_t in_nmi;          /* the last record had the flag NMI, and that was told */
	uint8_t gif_clear;       /* an exit of SVM cleared GIF, and that it was set again was not told */
};

struct ftr_vcpu { uint32_t pid; uint32_t id; };   /* thread; KVM's number, FTR_NONE: not known */

struct ftr_damage { uint64_t at; uint32_t stream; uint32_t reserved; };   /* at: of the page, bytes of its stream */

struct ftr_answer { uint64_t key[2], value; uint32_t code; uint32_t point; };   /* point 0: none */

struct ftr_state {
	struct ftr_stream *stream;
	struct ftr_point *point;
	const uint16_t *number;      /* 65536: the tracepoint with this id */
	uint32_t streams, points;
	uint32_t data_at;            /* of the records in a page */
	uint32_t commit_at;
	uint32_t long_size;          /* 4, 8: of the field commit */
	struct ftr_field type, flags, pid;   /* common to all records; size of type 2 */
	uint64_t note[8];            /* the event before a delivery whose record has the flag NMI; kind 0: none */
	uint32_t first_vcpu;         /* CPUs of the host */
	uint32_t vcpus;
	uint32_t primed;             /* streams that were begun */
	uint32_t waiting;            /* the running heap of streams */
	uint32_t stream_wanted;      /* why ftr_run() came back early: pages or an answer for this stream, FTR_NONE: neither */
	uint32_t point_asked;        /* the tracepoint of the record to answer for, FTR_NONE: pages are wanted */
	const uint8_t *record;       /* that record */
	uint32_t record_size;
	uint32_t damages;
	uint64_t count[10];          /* enum ftr_count */
	struct ftr_damage damage[20];
	uint32_t heap[8192];
	struct ftr_answer asked;         /* what is asked for; point 0: for this one record */
	struct ftr_answer answer[256];   /* by hash of their keys */
	uint64_t code[4096];         /* addresses in the upper half where the host was interrupted, by hash; 0: none */
	uint32_t codes;
	uint32_t reserved;
	struct ftr_vcpu vcpu[4096];
	uint16_t slot[8192];         /* vCPU + 1 by hash of the thread */
};

/** Write events, at most cap.  Returns how many.  stream_wanted FTR_NONE and fewer than cap: the end.  Else the stream needs
 *  new data (or `last`), or, with point_asked set, the last event in its queue is to be completed; then call again.
 *  Errors: ARG. */
int64_t ftr_run(struct ftr_state *s, void *ret, uint64_t cap);
/** Complete the event asked for.  Errors: ARG (none was). */
int ftr_answer(struct ftr_state *s, uint64_t value, uint32_t code);
/* cffi: end */

#endif
