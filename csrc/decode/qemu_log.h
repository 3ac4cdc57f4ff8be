/*
 * qemu_log.h - ordinary blocks of QEMU's `-d int` log: the `v=` line with the register dump behind it.
 *
 * The scanner reads blocks that stand whole, one after the other, and whose meaning depends on nothing but the state below,
 * and lines of trace events that say nothing of interrupts.  It stops before anything else: torn lines, resets, tables and
 * CPUs that are new, numbers out of order, an exception at the place of the event before it.  Its caller
 * (formats/qemu/text.py), which can read all of it by itself and gives the same events, reads on from there.
 */
#ifndef TRACEDBG_QEMU_LOG_H
#define TRACEDBG_QEMU_LOG_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
enum qlog_size { QLOG_CPUS = 4096, QLOG_TABLES = 1024, QLOG_TOPS = 16 };

enum qlog_stamp { QLOG_TRACE_STAMP = 1, QLOG_LINE_STAMP = 2 };

struct qlog_tables {     /* the TR and IDT bases of a register dump, and whose they are */
	uint64_t tr, idt;          /* as printed */
	uint64_t tr_base, idt_base; /* as they are: code of 32 bits shows half of TR's */
	uint64_t top[QLOG_TOPS];   /* of IST stacks, where they are known */
	uint32_t count;            /* events in long mode */
	uint16_t cpu;
	uint8_t digits;            /* 0: free; else 4 | TR has 16 digits | 2 * IDT has 16 digits */
	uint8_t tops;              /* how many; more than QLOG_TOPS: they are not here */
	uint8_t odd_top;           /* a frame may have to begin where no address is canonical */
	uint8_t reserved[7];
};

struct qlog_cpu {
	uint64_t tr, idt;   /* bases at its last event */
	uint64_t ip, sp;    /* of its last event, if that was an attempt */
	uint32_t rflags;    /* likewise */
	int32_t last;       /* index of the event in the output of this call */
	uint16_t cs;        /* likewise */
	uint8_t ready;      /* the fields above are valid */
	uint8_t attempt;    /* the last event was an attempt: ip, sp, cs and rflags are valid; 2: but for rflags */
	uint8_t long_mode;
	uint8_t touched;    /* it had an event in this call */
	uint8_t soft;       /* the last event was an INT n */
	uint8_t reserved;
};

struct qlog {
	const uint8_t *served; /* [256]: enum tdb_source of a Servicing line, by vector */
	int64_t expected;      /* number of the next event */
	int64_t time;          /* microseconds; -1: none */
	uint64_t used, lines;  /* bytes and lines read by this call */
	uint32_t tss_bytes;    /* size of a TSS */
	uint32_t error_codes;  /* bit n: exception n pushes an error code */
	uint32_t legacy;       /* events outside of long mode, summed up */
	uint32_t before_ltr;   /* events with a TR base of 0, likewise */
	uint32_t stamps;       /* enum qlog_stamp seen */
	uint32_t told;         /* 1: a source of `served` other than external was used */
	uint32_t touched;
	uint16_t touch[QLOG_CPUS]; /* the `touched` CPUs that had an event in this call */
	struct qlog_cpu cpu[QLOG_CPUS];
	struct qlog_tables tables[QLOG_TABLES];
};

/* The slot of `tables` for a pair of bases. */
uint32_t qlog_slot(uint64_t tr, uint64_t idt);

/*
 * Read text[0, size) from its beginning; nothing is begun at or behind `limit`.  At most `max` events go to `out` (64 bytes
 * each).  Returns their number and sets `used`, or DEC_E_ARG.
 */
int64_t qlog_scan(struct qlog *q, const uint8_t *text, size_t size, size_t limit, void *out, uint32_t max);
/* cffi: end */

#endif
