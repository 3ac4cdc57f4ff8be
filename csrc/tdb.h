/*
 * tdb.h - the public interface of the tracedbg replay core.
 *
 * The text between the two cffi markers is handed to cffi as it stands, so it holds no macros, attributes or bit-fields.
 *
 * Rules of the interface
 *   - A handle is used by one thread at a time.  There are no globals, threads or callbacks.
 *   - Functions return a value >= 0 on success and a negative enum tdb_status on failure; out-parameters come last and are
 *     untouched on failure.
 *   - tdb_open() borrows the event and payload buffers until tdb_close(); the layout and its memory are copied.
 *   - Addresses are guest linear addresses; ranges are [lo, hi).  "Event" numbers are indices into the event array.
 *     A position p is the state after the first p events, 0 <= p <= count.
 */
#ifndef TRACEDBG_TDB_H
#define TRACEDBG_TDB_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
enum tdb_status {
	TDB_OK = 0,
	TDB_E_NOMEM = -1,  /* allocation failed */
	TDB_E_ARG = -2,    /* an argument is NULL, out of range or of another ABI */
	TDB_E_RANGE = -3,  /* a position or index lies outside the trace */
	TDB_E_LIMIT = -4   /* more events than the core can number */
};

enum tdb_kind {
	TDB_DELIVER = 1,   /* an interrupt or exception was delivered (flag FAILED: was tried) */
	TDB_ENTER = 2,     /* the state after a delivery, where the source has it */
	TDB_RETURN = 3,    /* arg: enum tdb_return; addr/value/cs/ss/rflags = popped rip/rsp/cs/ss/rflags, rsp = the frame;
			      ERETU, ERETS: code = bits 16 and up of the popped SS word */
	TDB_WRITE = 4,     /* software stored arg bytes at addr */
	TDB_READ = 5,      /* software loaded arg bytes from addr */
	TDB_MOVE = 6,      /* software copied a frame: addr -> value */
	TDB_SETSP = 7,     /* software changed RSP: addr -> value */
	TDB_TSS = 8,       /* TSS slot arg (0-2 RSPn, 9-15 IST1-7) := value */
	TDB_GATE = 9,      /* gate arg := handler value, code = raw high dword of gate bytes 4-7 */
	TDB_LTR = 10,      /* TR base := value */
	TDB_LIDT = 11,     /* IDT base := value */
	TDB_SYSCALL = 12,  /* addr = new RIP */
	TDB_SYSRET = 13,   /* addr = new RIP */
	TDB_SYSENTER = 14, /* addr = new RIP */
	TDB_RAISE = 15,    /* a request (vector arg, source) was made or latched */
	TDB_UNBLOCK = 16,  /* arg 0: NMI blocking ended by something other than a return; arg 1: STGI */
	TDB_SMI = 17,
	TDB_RSM = 18,
	TDB_MSR = 19,      /* MSR code := value */
	TDB_CR = 20,       /* CR arg := value */
	TDB_GS = 21,       /* arg 0 SWAPGS; arg 1 GS base := value */
	TDB_FLAGS = 22,    /* RFLAGS := rflags; not known: arg, if that is, = IF */
	TDB_SHADOW = 23,   /* STI (arg 0) or MOV SS (arg 1) shadow: rip = the instruction it covers */
	TDB_EOI = 24,
	TDB_TOKEN = 25,    /* shadow-stack token of IST arg (0 other) at addr: held code, holds value; bit 0 busy */
	TDB_VMEXIT = 26,   /* arg 0 VMX, 1 SVM; source nmi: for an NMI; rip ... = the host's state after it */
	TDB_VMENTRY = 27,  /* arg bit 0: virtual NMIs */
	TDB_MODE = 28,     /* arg 0 real, 1 protected 32-bit, 2 long */
	TDB_INIT = 29,     /* RESET (arg 0) or INIT (arg 1) */
	TDB_SHUTDOWN = 30, /* the CPU shut down; arg: enum tdb_shutdown */
	TDB_GAP = 31,      /* records were lost; value = how many, if known; cpu unknown: all CPUs */
	TDB_MARK = 32
};

enum tdb_source {      /* where a delivery came from */
	TDB_SRC_UNKNOWN = 0,
	TDB_SRC_EXCEPTION = 1,
	TDB_SRC_NMI = 2,
	TDB_SRC_MC = 3,
	TDB_SRC_SOFT_INT = 4,  /* INT n, INT3, INTO: code = instruction length, added to rip in the frame */
	TDB_SRC_FIXED = 5,     /* local APIC */
	TDB_SRC_EXTINT = 6,    /* 8259 */
	TDB_SRC_INJECTED = 7,  /* by a VMM, as an external interrupt; what it injects as an NMI, #MC or exception is that */
	TDB_SRC_EXTERNAL = 8,  /* FIXED or EXTINT, unknown which */
	TDB_SRC_SYSCALL = 9    /* FRED: SYSCALL (vector 1) or SYSENTER (vector 2) delivered as an event; code as for SOFT_INT */
};

enum tdb_return { TDB_RET_IRET = 0, TDB_RET_ERETU = 1, TDB_RET_ERETS = 2 };

enum tdb_known {       /* bit set: that field of the event is valid */
	TDB_K_TIME = 1, TDB_K_RIP = 2, TDB_K_RSP = 4, TDB_K_ADDR = 8, TDB_K_VALUE = 16, TDB_K_RFLAGS = 32, TDB_K_CODE = 64,
	TDB_K_SOURCE_INDEX = 128, TDB_K_CPU = 256, TDB_K_CS = 512, TDB_K_SS = 1024, TDB_K_ARG = 2048, TDB_K_SOURCE = 4096
};

enum tdb_event_flag {
	TDB_F_FAILED = 1,   /* deliver: an attempt that died before the handler; addr = 8-byte words it stored, if known */
	TDB_F_FAULTED = 2,  /* return: faulted */
	TDB_F_PARTIAL = 4,  /* the source's record was damaged; unknown fields are cleared in `known` */
	TDB_F_EXT = 8,      /* external event bit of an error code */
	TDB_F_SMM = 16,     /* happened in SMM */
	TDB_F_BYTES = 32,   /* value = offset of the bytes in the BYTES section; for write/read code = length */
	TDB_F_LEGACY = 64   /* not in long mode: counted, not judged */
};

enum tdb_shutdown { TDB_SHUT_TRIPLE_FAULT = 0, TDB_SHUT_MCIP = 1, TDB_SHUT_MCE_OFF = 2, TDB_SHUT_OTHER = 3 };

struct tdb_event {
	uint64_t time, rip, rsp, addr, value;
	uint32_t rflags, code, source_index;
	uint16_t cpu, cs, ss, known;
	uint8_t kind, arg, source, flags;
};

/* -- layout ------------------------------------------------------------------------------------------------------- */
enum tdb_gate_flag { TDB_GATE_KNOWN = 1, TDB_GATE_PRESENT = 2 };

struct tdb_gate {
	uint64_t offset;
	uint16_t selector;
	uint8_t ist;    /* 0-7 */
	uint8_t type;   /* 0xe interrupt gate, 0xf trap gate */
	uint8_t dpl;
	uint8_t flags;  /* enum tdb_gate_flag */
	uint16_t reserved;
};

struct tdb_idt {
	uint64_t base;
	struct tdb_gate gate[256];
};

struct tdb_tss {
	uint64_t base;
	uint64_t rsp[3];
	uint64_t ist[8];   /* [0] unused */
	uint32_t known;    /* bit n: rsp[n]; bit 8+n: ist[n] */
	uint32_t reserved;
};

enum tdb_fred_known { TDB_FK_STKLVLS = 16, TDB_FK_CONFIG = 32 };  /* bit n (0-3): rsp[n] */

struct tdb_fred {      /* FRED delivery at the start */
	uint64_t rsp[4];       /* IA32_FRED_RSP0-3 */
	uint64_t stklvls;      /* IA32_FRED_STKLVLS */
	uint64_t config;       /* IA32_FRED_CONFIG */
	uint32_t known;        /* enum tdb_fred_known */
	uint32_t on;           /* 1: events are delivered by FRED, 0: through the IDT */
};

struct tdb_cpu_layout {
	int32_t tss;   /* index of the TSS loaded at the start, -1 unknown */
	int32_t idt;   /* index of the IDT loaded at the start, -1 unknown */
};

enum tdb_region_kind {
	TDB_REGION_STACK = 0,   /* a stack; slot = 1-7 IST, 8 RSP0, 0 other */
	TDB_REGION_USER = 1,    /* memory of CPL3 */
	TDB_REGION_STORES = 2,  /* every software store into it is recorded */
	TDB_REGION_READS = 3    /* every software load from it is recorded */
};

struct tdb_region {
	uint64_t lo, hi;
	uint16_t cpu;
	uint8_t kind;
	uint8_t slot;
	uint32_t assumed;   /* 1: nothing tells lo; no verdict rests on it */
};

struct tdb_memory {    /* initial contents */
	uint64_t addr, length;
	const uint8_t *bytes;
};

enum tdb_fidelity {
	TDB_FID_RETURNS = 1,    /* every return of every CPU is recorded */
	TDB_FID_SS_ZEROED = 2,  /* the source zeroes SS on an IST switch (QEMU TCG): no mismatch */
	TDB_FID_INFERRED = 4,   /* the events are inferred from one instant (a dump): no finding is stronger than that */
	TDB_FID_GUESTS = 8      /* from vmentry to vmexit the events are the guest's, by its own tables (Intel PT) */
};

struct tdb_layout {
	const struct tdb_tss *tss;
	const struct tdb_idt *idt;
	const struct tdb_cpu_layout *cpu;
	const struct tdb_fred *fred;     /* one for each of cpu, or NULL */
	const struct tdb_region *region;
	const struct tdb_memory *memory;
	uint32_t tss_count, idt_count, cpu_count, region_count, memory_count;
	uint32_t fidelity;
};

struct tdb_config {
	uint32_t size;               /* sizeof(struct tdb_config) */
	uint32_t snapshot_interval;  /* events between snapshots at first; doubles when there are too many */
	uint32_t max_snapshots;
	uint32_t max_pages;          /* stack pages kept; the least recently written are forgotten beyond it */
	uint32_t max_frames;         /* open frames kept */
	uint32_t max_findings;       /* kept; further ones are only counted */
	uint32_t iret_fault_unblocks;/* 1: a faulting IRET unblocks NMIs (SDM Vol. 3A 6.7.1); 0: it does not */
	uint32_t nmi_fail_blocks;    /* 1: an NMI whose delivery faulted leaves NMIs blocked; 0: unknown (open in the manual) */
	uint64_t max_bytes;          /* of pages and snapshots together; snapshots are thinned out to keep it */
};

/* -- results ------------------------------------------------------------------------------------------------------- */
enum tdb_cpu_known {
	TDB_CK_RIP = 1, TDB_CK_RSP = 2, TDB_CK_CS = 4, TDB_CK_SS = 8, TDB_CK_RFLAGS = 16, TDB_CK_NMI = 32, TDB_CK_MCIP = 64,
	TDB_CK_USER_RSP = 128, TDB_CK_CSL = 256, TDB_CK_GS = 512, TDB_CK_TPR = 1024, TDB_CK_MCE = 2048, TDB_CK_GIF = 4096
};

struct tdb_cpu {
	uint64_t rip, rsp, user_rsp;       /* user_rsp: RSP last seen at CPL3 */
	uint32_t rflags, known;            /* known: enum tdb_cpu_known */
	uint32_t event;                    /* last event of this CPU, UINT32_MAX none */
	uint32_t nmi_since;                /* the delivery that blocked NMIs */
	uint32_t nmi_unblocked_by;         /* event that showed the end of blocking, UINT32_MAX none */
	uint32_t nmi_unblock_frame;        /* entry event of the frame whose return did it, UINT32_MAX unknown */
	int32_t tss, idt;                  /* current tables, -1 unknown */
	uint16_t cs, ss;
	uint8_t nmi_blocked, nmi_pending, mcip, gap;
	uint32_t ring_gap;         /* the SYSCALL or SYSRET since which RSP is user mode's, UINT32_MAX none */
	uint8_t csl;               /* FRED stack level */
	uint8_t gs;                /* GS base: 1 the kernel's, 0 user mode's */
	uint8_t tpr;               /* task priority, bits 7:0 */
	uint8_t mce;               /* CR4.MCE */
	uint8_t gif;               /* SVM's global interrupt flag */
	uint8_t fred;              /* events are delivered by FRED */
	uint8_t shadow;            /* 1 STI, 2 MOV SS: its shadow covers the next instruction */
	uint8_t smm, guest;        /* in SMM; between VM entry and VM exit */
	uint8_t token_known, token_busy;  /* bit n: shadow-stack token of IST n */
	uint8_t reserved;
	struct tdb_fred levels;    /* FRED's MSRs now */
};

enum tdb_frame_status {
	TDB_FRAME_LIVE = 0,       /* open: its context is still to be resumed, as far as known */
	TDB_FRAME_CLOBBERED = 1,  /* open, and another delivery stored over it */
	TDB_FRAME_MOVED = 2       /* open, and software copied it away (a move event) */
};

enum tdb_settle {      /* why a frame stopped being open */
	TDB_SETTLE_RETURN = 0,     /* a recorded return popped it */
	TDB_SETTLE_COPY = 1,       /* a recorded return popped a copy of it */
	TDB_SETTLE_CONTEXT = 2,    /* its saved RIP and RSP were seen again */
	TDB_SETTLE_ABOVE = 3,      /* RSP was seen on the saved stack at or above the saved RSP */
	TDB_SETTLE_IF = 4,         /* code with IF=1 ran off its stack though its gate clears IF */
	TDB_SETTLE_CPL3 = 5,       /* the CPU ran at CPL3 */
	TDB_SETTLE_POPPED = 6,     /* RSP was seen above it on its own stack */
	TDB_SETTLE_OVERWRITTEN = 7,/* an open frame was overwritten (clobber) */
	TDB_SETTLE_DROPPED = 8,    /* forgotten because of a limit, a gap or a reset */
	TDB_SETTLE_NMI = 9,        /* the NMI that blocked NMIs, and a genuine NMI came: its IRET had unblocked them */
	TDB_SETTLE_NESTING = 10,   /* as many returns came as deliveries since: one of them was its own, if they nest */
	TDB_SETTLE_COUNT = 11
};

struct tdb_context {
	uint64_t rip, rsp, rflags, code;   /* code: error code, if pushed */
	uint16_t cs, ss;
	uint32_t known;                    /* enum tdb_known bits RIP RSP RFLAGS CODE CS SS */
};

struct tdb_frame {
	uint64_t lo, hi;           /* bytes of the frame; hi = the aligned top */
	struct tdb_context saved;  /* what the delivery stored */
	uint64_t stack_lo, stack_hi;
	uint32_t entry;            /* the delivery */
	uint32_t clobbered_by;     /* newest delivery that stored over it, UINT32_MAX none */
	uint32_t finding;          /* finding of that overwrite (live: of one with the same bytes), UINT32_MAX none */
	uint32_t victim;           /* entry of the open frame that this one overwrote, UINT32_MAX none */
	uint16_t cpu;
	uint8_t vector, source, ist, status, has_code, gate_type;
	uint8_t fred;              /* 1: 64 bytes, RIP at hi-56; 0: RIP at hi-40 */
	uint8_t level, from_level; /* FRED stack level of the handler and of what it interrupted */
	uint8_t gs;                /* GS base when it was stored: 0 user mode's, 1 the kernel's, 2 unknown */
	uint8_t hazards;           /* bit enum tdb_hazard: a window was looked at */
	uint8_t reserved[3];
	uint32_t ring_gap;         /* the SYSCALL or SYSRET in whose gap it came, UINT32_MAX none */
	uint32_t overwritten_by;   /* first delivery that stored over it, UINT32_MAX none */
	uint32_t depth;            /* deliveries of its CPU before it that no return had come for */
	uint32_t reserved2;
};

enum tdb_hazard { TDB_HAZARD_NMI = 0, TDB_HAZARD_MC = 1, TDB_HAZARD_MASKABLE = 2, TDB_HAZARD_NEIGHBOUR = 3 };

struct tdb_word {
	uint64_t addr, value;
	uint32_t writer[8];    /* event that wrote each byte; UINT32_MAX: initial contents */
	uint8_t known;         /* bit b: byte b is known */
	uint8_t reserved[7];
};

enum tdb_stack_flag { TDB_STACK_NAMED = 1, TDB_STACK_ASSUMED = 2 };

struct tdb_stack {
	uint64_t lo, hi;
	uint32_t frames;   /* open frames on it */
	uint16_t cpu;
	uint8_t slot;      /* 1-7 IST, 8 RSP0, 0 other */
	uint8_t flags;     /* enum tdb_stack_flag */
};

enum tdb_rule {
	TDB_R_FRAME_CLOBBERED = 0,
	TDB_R_FRAME_CONSUMED_CORRUPT = 1,
	TDB_R_RESUME_LOOP = 2,
	TDB_R_FRAME_RELOCATED = 3,
	TDB_R_FRAME_SAME_BYTES = 4,
	TDB_R_USER_STACK = 5,
	TDB_R_FAKE_NMI = 6,
	TDB_R_FAKE_MCE = 7,
	TDB_R_DOUBLE_FAULT = 8,
	TDB_R_SHUTDOWN = 9,
	TDB_R_TRACE_GAP = 10,
	TDB_R_MODEL_MISMATCH = 11,
	TDB_R_NEIGHBOUR_OVERWRITE = 12,
	TDB_R_STACK_OVERFLOW = 13,
	TDB_R_ERROR_CODE_MISMATCH = 14,
	TDB_R_TRIPLE_FAULT = 15,
	TDB_R_TOKEN_BUSY = 16,
	TDB_R_REENTRY_WINDOW = 17,
	TDB_R_NMI_STUCK = 18,
	TDB_R_NMI_LOST = 19,
	TDB_R_HELD_VECTOR = 20,
	TDB_R_ILLEGAL_VECTOR = 21,
	TDB_R_UNMATCHED_RETURN = 22
};

enum tdb_evidence { TDB_EV_UNKNOWN = 0, TDB_EV_INFERRED = 1, TDB_EV_COMPUTED = 2, TDB_EV_RECORDED = 3 };

enum tdb_cause {       /* why the writer could come while the victim was open */
	TDB_CAUSE_NONE = 0,
	TDB_CAUSE_NMI_UNBLOCKED = 1,     /* a return unblocked NMIs: cause_event, cause_frame */
	TDB_CAUSE_NMI_NEVER_BLOCKED = 2, /* the victim was not a genuine NMI, so NMIs were not blocked */
	TDB_CAUSE_NMI_UNKNOWN = 3,       /* NMIs were blocked as far as known; what unblocked them is not recorded */
	TDB_CAUSE_MC_UNMASKED = 4,       /* #MC is held off only by MCIP */
	TDB_CAUSE_MASKABLE = 5,          /* a maskable interrupt: IF was 1 in the victim's handler */
	TDB_CAUSE_SOFTWARE = 6,          /* software raised it (INT n, an exception) inside the victim's handler */
	TDB_CAUSE_OTHER_CPU = 7,         /* another CPU's TSS names the same stack */
	TDB_CAUSE_RING_GAP = 8,          /* user-stack: after the SYSCALL or SYSRET cause_event RSP is still user mode's */
	TDB_CAUSE_MOV_SS = 9             /* user-stack: a #DB that MOV SS (cause_event) held back until after the SYSCALL */
};

enum tdb_mismatch {    /* model-mismatch: what differs; in tdb_finding.detail */
	TDB_MM_ENTER_RSP = 1, TDB_MM_ENTER_RIP = 2, TDB_MM_ENTER_CS = 4, TDB_MM_NMI_BLOCKED = 8, TDB_MM_IF_CLEAR = 16,
	TDB_MM_GATE = 32,          /* the gate or its stack pointer cannot deliver */
	TDB_MM_MC_SHUTDOWN = 64,   /* #MC with MCIP set or CR4.MCE clear */
	TDB_MM_TPR = 128,          /* held by the task priority */
	TDB_MM_DOUBLE_FAULT = 256, /* the table of double faults says otherwise */
	TDB_MM_GIF = 512,          /* held by SVM's GIF */
	TDB_MM_TOKEN = 1024        /* the shadow-stack token was busy */
};

struct tdb_finding {
	uint8_t rule;              /* enum tdb_rule: the final word of the scan */
	uint8_t raised_rule;       /* the rule as raised, before it was settled */
	uint8_t evidence;          /* enum tdb_evidence of the raised fact */
	uint8_t settled_evidence;  /* of the settling fact */
	uint8_t cause;             /* enum tdb_cause */
	uint8_t slots;             /* bit: 0 rip 1 cs 2 rflags 3 rsp 4 ss 5 error code; slots overwritten */
	uint8_t differ;            /* the same bits: slots whose value differs */
	uint8_t reserved;
	uint32_t event;            /* where it was raised */
	uint32_t settled;          /* where it was settled, UINT32_MAX never */
	uint32_t consumer;         /* the return that consumed it, UINT32_MAX none */
	uint32_t cause_event;      /* enum tdb_cause says what, UINT32_MAX none */
	uint32_t cause_frame;
	uint32_t count;            /* how often, for rules that are folded */
	uint16_t cpu;
	uint16_t settled_by;       /* enum tdb_settle, when settled by seeing the victim run */
	uint16_t detail;           /* shutdown reason, mismatch bits, vector of a fold */
	uint16_t reserved2;
	uint64_t lo, hi;           /* the bytes overwritten, or the frame concerned */
	struct tdb_frame victim;   /* as it was stored; entry UINT32_MAX: none */
	struct tdb_frame writer;   /* entry UINT32_MAX: none */
	struct tdb_context popped; /* what the consumer popped */
};

struct tdb_stats {
	uint64_t events, deliveries, judged, unjudged, legacy, failed, returns, writes, gaps;
	uint64_t findings;                     /* raised, kept or not */
	uint64_t settled[11];                  /* frames of IST gates and raised FRED levels by enum tdb_settle */
	uint64_t ist_deliveries[8];            /* deliveries by IST number; [0] without */
	uint64_t open_at_end;                  /* clobbered frames whose fate is open */
	uint64_t pages_forgotten, bad_events;
	uint32_t snapshots, pages, frames, interval;
	uint64_t bytes;                        /* of pages and snapshots now */
	uint64_t first_bad;                    /* the first of the bad events, UINT64_MAX none */
};

struct tdb_bucket {    /* what a stretch of events on a CPU was like */
	uint32_t deliveries, findings, gaps;
	uint32_t depth;            /* the greatest number of open frames after one of its events */
};

/* -- searching ----------------------------------------------------------------------------------------------------- */
enum tdb_filter_test { /* bit set: that part of a filter is looked at */
	TDB_FT_KIND = 1, TDB_FT_ARG = 2, TDB_FT_SOURCE = 4, TDB_FT_CPU = 8, TDB_FT_ADDRESS = 16, TDB_FT_FLAGS = 32
};

enum { TDB_MAX_FILTERS = 64 };

struct tdb_range { uint64_t lo, last; };   /* last is part of it: a range may end with the address space */

struct tdb_filter {    /* an event passes if it passes every test; a field that is not known passes none */
	uint64_t kinds;                 /* bit kind-1 */
	uint64_t arg[4];                /* bit n: the event's arg, a vector where it is one */
	uint64_t cpu[64];               /* bit n: CPU n */
	const struct tdb_range *range;  /* by address, disjoint: one of `fields` lies in one of them, for a write or a read a byte
					   of it; what is not an address (a length, an offset, a count) never does */
	uint32_t ranges;
	uint32_t sources;               /* bit enum tdb_source; not known: TDB_SRC_UNKNOWN */
	uint16_t fields;                /* enum tdb_known: RIP RSP ADDR VALUE */
	uint8_t flags;                  /* enum tdb_event_flag: all of them set */
	uint8_t tests;                  /* enum tdb_filter_test */
	uint8_t invert;                 /* 1: the events that do not pass it */
	uint8_t reserved[3];
};

struct tdb_tally {     /* how many */
	uint64_t deliveries;
	uint64_t vector[256];  /* of them by vector, */
	uint64_t source[10];   /* by enum tdb_source */
	uint64_t cpu[4096];    /* events of all kinds by CPU */
};

/* -- history -------------------------------------------------------------------------------------------------------- */
enum tdb_touch {       /* what an event does to bytes or a frame that are watched */
	TDB_TOUCH_WRITE = 1,   /* it stores some of the bytes (a delivery, a failed one too, a write, a move) */
	TDB_TOUCH_READ = 2,    /* a read event loads some of them */
	TDB_TOUCH_POP = 4,     /* a return pops some of them, whosever frame they are */
	TDB_TOUCH_COPY = 8,    /* a move copies some of them, of the frame that it names */
	TDB_TOUCH_END = 16     /* the frame is not open any more after it */
};

struct tdb_watch {
	uint64_t lo, hi;       /* the bytes, at most 65536 */
	uint32_t frame;        /* TDB_TOUCH_END: the delivery of the frame */
	uint32_t touch;        /* enum tdb_touch: what is asked for */
};

struct tdb_hit {
	uint64_t value;        /* the 8 bytes from lo on after the event; unknown ones are 0 */
	uint32_t event;
	uint8_t touch;         /* enum tdb_touch, of what was asked for */
	uint8_t known;         /* bit b: byte b of value is known */
	uint16_t reserved;
};

/* -- journal -------------------------------------------------------------------------------------------------------- */
struct tdb_life {      /* a frame that was opened, from its delivery to its end */
	struct tdb_frame frame;    /* as it was stored */
	uint32_t end;              /* the event after which it was not open any more, UINT32_MAX: it is still open */
	uint32_t overwritten;      /* the first delivery that stored over it while it was open, UINT32_MAX none */
	uint32_t finding;          /* finding of that, UINT32_MAX none */
	uint8_t settle;            /* enum tdb_settle; TDB_SETTLE_COUNT: it is still open */
	uint8_t status;            /* enum tdb_frame_status when it ended */
	uint8_t reserved[2];
};

typedef struct tdb_replay tdb_replay;

/** ABI number; a caller compares it with the one it was built for. */
int tdb_abi(void);
/** English text of a status; never NULL. */
const char *tdb_strerror(int status);
/** Fill in size and defaults. */
void tdb_config_init(struct tdb_config *ret);
/** Open a replay of count events.  Borrows events, bytes and layout->memory bytes until tdb_close().
 *  cpus: CPUs of the trace, 1-4096.  Errors: NOMEM, ARG, LIMIT (count >= 2^32-2). */
int tdb_open(const struct tdb_config *cfg, const struct tdb_event *events, uint64_t count, uint32_t cpus,
	     const uint8_t *bytes, uint64_t bytes_size, const struct tdb_layout *layout, tdb_replay **ret);
/** Close; NULL is fine. */
void tdb_close(tdb_replay *r);
/** Go on with a longer trace: events, of which there are now count, begins with the same events as the array in use and is
 *  borrowed in its place.  Where the address differs, what was there is compared.  Neither scan nor view moves.
 *  Errors: ARG (shorter, or other events), LIMIT (as tdb_open()). */
int tdb_extend(tdb_replay *r, const struct tdb_event *events, uint64_t count);
/** Go on with the forward pass by at most max events; returns how many were taken, 0 at the end.  Errors: NOMEM. */
int64_t tdb_scan(tdb_replay *r, uint64_t max);
/** Events covered by the forward pass. */
uint64_t tdb_scanned(const tdb_replay *r);
/** Move the view to a position in steps of at most max events, scanning first where the scan has not been; returns 0
 *  when there, else a positive number.  Errors: NOMEM, RANGE. */
int64_t tdb_seek_some(tdb_replay *r, uint64_t position, uint64_t max);
/** The position of the view. */
uint64_t tdb_position(const tdb_replay *r);
/** State of one CPU in the view.  Errors: RANGE. */
int tdb_get_cpu(const tdb_replay *r, uint32_t cpu, struct tdb_cpu *ret);
/** Current value of the TSS of a CPU in the view.  Errors: RANGE (no such CPU, or TSS unknown). */
int tdb_get_tss(const tdb_replay *r, uint32_t cpu, struct tdb_tss *ret);
/** The gate that a CPU would use for a vector.  Errors: RANGE. */
int tdb_get_gate(const tdb_replay *r, uint32_t cpu, uint32_t vector, struct tdb_gate *ret);
/** Stacks by address: the named ones, and others with open frames.  Fills at most cap, returns the total.  Errors: NOMEM. */
int64_t tdb_get_stacks(const tdb_replay *r, struct tdb_stack *ret, uint64_t cap);
/** Open frames in entry order.  Fills at most cap, returns the total. */
int64_t tdb_get_frames(const tdb_replay *r, struct tdb_frame *ret, uint64_t cap);
/** Words with a known byte in [lo, hi), by address; lo is rounded down to 8.  Fills at most cap, returns the total. */
int64_t tdb_get_words(const tdb_replay *r, uint64_t lo, uint64_t hi, struct tdb_word *ret, uint64_t cap);
/** Findings from number first on, in the order raised, as far as scanned.  Fills at most cap, returns the total kept. */
int64_t tdb_get_findings(const tdb_replay *r, uint64_t first, struct tdb_finding *ret, uint64_t cap);
/** How many of those findings had been raised at the view's position. */
int64_t tdb_findings_raised(const tdb_replay *r);
/** The frame that the delivery of the last applied event stored; RANGE if the last event of the view was not a judged
 *  delivery. */
int tdb_get_last_frame(const tdb_replay *r, struct tdb_frame *ret);
/** Digest of the view's state; docs/format of the hashed words: tests/model.py digest().  Errors: NOMEM. */
int tdb_digest(const tdb_replay *r, uint64_t *ret);
/** Counters of the forward pass. */
int tdb_get_stats(const tdb_replay *r, struct tdb_stats *ret);
/** Events [first, first + count) of one CPU (UINT32_MAX: of all, with the greatest depth of any) in equal buckets, as far
 *  as scanned: event i belongs to bucket (i - first) * buckets / count.  Returns the width in events of the cells that the
 *  scan has kept, a power of two: a count stands where its cell begins, a depth wherever the cell reaches.  Findings and
 *  gaps of no CPU count for each.  Errors: ARG (no bucket, or more of them than events), RANGE. */
int64_t tdb_timeline(const tdb_replay *r, uint32_t cpu, uint64_t first, uint64_t count, uint32_t buckets,
		     struct tdb_bucket *ret);
/** Search for an event that passes all of the filters (none: any event), from `from` on (dir +1 or -1, from included).
 *  Looks at most at max events.  Returns the index.  Errors: RANGE (none was found, or no such event), ARG. */
int64_t tdb_find_filter(const tdb_replay *r, const struct tdb_filter *filter, uint32_t filters, uint64_t from, int dir,
			uint64_t max);
/** The indices of events from `from` on that pass all of the filters, at most cap, of at most max events.  Returns how many;
 *  *next is the event to go on from, count at the end.  Entries of ret after those returned may have been written.
 *  Errors: RANGE, ARG. */
int64_t tdb_collect(const tdb_replay *r, const struct tdb_filter *filter, uint32_t filters, uint64_t from, uint64_t max,
		    uint32_t *ret, uint64_t cap, uint64_t *next);
/** Add at most max events from `from` on to a tally that the caller has zeroed.  Returns how many, 0 at the end.
 *  Errors: RANGE, ARG. */
int64_t tdb_tally(const tdb_replay *r, uint64_t from, uint64_t max, struct tdb_tally *ret);
/** Move the view on, scanning first where the scan has not been, and note the events that touch what is watched.  Ends after
 *  cap of them, after the one that ends the frame, after at most max events of work, at the end of the trace: the view stands
 *  behind the last event that was looked at, and another call goes on there.  Returns how many were noted.
 *  Errors: NOMEM, ARG (nothing to watch, or the frame is not open at the view's position). */
int64_t tdb_watch(tdb_replay *r, const struct tdb_watch *watch, uint64_t max, struct tdb_hit *ret, uint64_t cap);
/** The first event from `from` on, of at most max, whose time is known and not before `time`.  Errors: RANGE (none was found). */
int64_t tdb_find_time(const tdb_replay *r, uint64_t from, uint64_t time, uint64_t max);
/** Keep (on 1) or stop keeping (on 0) a journal of the frames that end in the forward pass, in the order of their ends.  What
 *  was not taken is forgotten.  It grows by at most one entry for a delivery and those that were open: take them often. */
void tdb_journal(tdb_replay *r, int on);
/** Take the oldest entries out of the journal, at most cap; returns how many were taken (ret NULL: how many there are). */
int64_t tdb_take_ended(tdb_replay *r, struct tdb_life *ret, uint64_t cap);
/** The frames that are open where the forward pass stands, in entry order.  Fills at most cap, returns the total. */
int64_t tdb_get_unended(const tdb_replay *r, struct tdb_life *ret, uint64_t cap);
/* cffi: end */

#endif
