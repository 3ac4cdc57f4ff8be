/*
 * xentrace.h - the records of Xen's xentrace into native events (tracedbg._decode).
 *
 * What a record means is said by struct xt_record, one for each event id; formats/xentrace/events.py declares them all.
 * Here is what is done with them: the state of each CPU, and the order of the events of several CPUs.
 */
#ifndef TRACEDBG_XENTRACE_H
#define TRACEDBG_XENTRACE_H

#include "decode.h"

/* cffi: begin */
enum { XT_CPUS = 4096, XT_RECORDS = 64, XT_REASONS = 2048, XT_TEXTS = 512, XT_DAMAGES = 20, XT_WORDS = 7 };

enum xt_vendor { XT_UNKNOWN = 0, XT_VMX = 1, XT_SVM = 2 };

enum xt_make {         /* what is done with a record, and the fields that it uses */
	XT_WRAP = 0,       /* nothing; its TSC is garbage */
	XT_LOST = 1,       /* value: records, time: of the first one */
	XT_ENTRY = 2,      /* VM entry */
	XT_EXIT = 3,       /* VM exit; code: reason, value: the guest's RIP */
	XT_RAISE = 4,      /* a request of the hypervisor for its guest; vector, code, value */
	XT_WAIT = 5,       /* the same, where its source (code) has a vector in xt_format.wait */
	XT_EXIT_WAS = 6,   /* says the source of the VM exit around it */
	XT_EXIT_NMI = 7,   /* the same; on SVM it is delivered then, with this vector */
	XT_INTR = 8,       /* the exit was for an interrupt; vector, if there is one: acknowledged by the exit */
	XT_TRAP = 9,       /* a trap passed on to the guest: as XT_DELIVER or XT_RAISE, xt_format.made_up says which */
	XT_DELIVER = 10,   /* a delivery; vector, rip, code, value */
	XT_BIND = 11,      /* irq gets vector */
	XT_UNBIND = 12,    /* irq has no vector */
	XT_HANDLED = 13,   /* irq: its interrupt was handled; time: low half, of its beginning */
	XT_MARK = 14,      /* text, plus value */
	XT_MAKES = 15
};

enum xt_what {         /* what is damaged */
	XT_CUT_SHORT = 0,
	XT_NO_WINDOW = 1,    /* no window begins here: the end of what can be read */
	XT_INSIDE = 2,       /* a window begins inside of another */
	XT_TOO_LONG = 3      /* a record is longer than its window */
};

struct xt_field {      /* where something lies in the payload: bits from a bit of a word on; 64: of two words, low one first */
	uint8_t word, shift, bits;   /* bits 0: it is not there */
	uint8_t reserved;
};

struct xt_record {
	uint64_t none;         /* a code of this value is none */
	uint32_t event;
	uint16_t text;         /* number of the first of its texts */
	uint8_t make;          /* enum xt_make */
	uint8_t words;         /* a payload that is shorter makes no event; all fields lie in them, but the one of XT_INTR */
	uint8_t arg;           /* the vector where no field has it */
	uint8_t source;        /* enum tdb_source */
	uint8_t vendor;        /* only this one's CPUs have it, enum xt_vendor */
	uint8_t reserved;
	struct xt_field vector, code, value, rip, time, irq;
	struct xt_field coded; /* 0: there is no code */
};

struct xt_format {
	struct xt_record record[XT_RECORDS];
	uint32_t records;
	uint32_t window;               /* the header of the record that begins a window: u32 CPU, u32 bytes behind it */
	uint32_t nmi_reason;           /* SVM: the exit is for an NMI */
	uint32_t texts;
	uint16_t length[XT_TEXTS];     /* bytes of a text */
	uint8_t reason[XT_REASONS];    /* whose alone a reason is, enum xt_vendor */
	uint8_t made_up[256];          /* by vector: 1: a trap with it is a request for the guest, no delivery by the CPU */
	uint8_t wait[8];               /* by source: the vector that waits, 0 none */
	uint8_t vendor;                /* enum xt_vendor; unknown: by the reasons */
	uint8_t reserved[7];
	uint64_t text_at;              /* offset of the first text that is used, in the BYTES of the trace */
};

struct xt_damage { uint64_t at; uint32_t what, reserved; };   /* offset in the input, enum xt_what */

struct xt_told {
	uint64_t records, windows, lost, gaps, odd_records, exits_of_unknown_vendor;
	uint64_t unordered;            /* how often what was held became too much, and was written before its time */
	uint64_t damages;              /* places; the first of them: */
	struct xt_damage damage[XT_DAMAGES];
	uint32_t cpus;                 /* the highest number + 1 */
	uint32_t texts;                /* used, in this order: */
	uint16_t text[XT_TEXTS];
	uint8_t vendor;                /* enum xt_vendor */
	uint8_t ended;                 /* 1: the input ends; 2: what follows cannot be read */
	uint8_t reserved[6];
};

typedef struct xt xt;

/** Bytes of memory that a decoder needs which holds that many events.  Errors: ARG (not 16 to 2^30). */
int64_t xt_size(uint64_t held);
/** Begin.  memory: xt_size(held) bytes, zeroed, aligned to 64 bytes; it is the decoder, and whose it is gives it back.
 *  Errors: ARG. */
int xt_open(void *memory, uint64_t held, const struct xt_format *format);
/** Take bytes of the input; last: there are no more behind them.  Returns how many were taken: less than all of them only if
 *  there are events (*count of them, to be used before the next call), or if the rest, at most 40 bytes, needs what comes
 *  behind it; more than 0 and no event if not.  The end is when `last` is given, nothing is taken and there is no event.
 *  Errors: ARG. */
int64_t xt_read(xt *x, const uint8_t *data, uint64_t size, int last, const struct tdb_event **ret, uint64_t *count);
/** What there was to say so far. */
void xt_tell(const xt *x, struct xt_told *ret);
/* cffi: end */

#endif
