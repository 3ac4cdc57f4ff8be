/*
 * pt.h - Intel Processor Trace: packets, and the events of Event Trace.
 *
 * The packets are those of the SDM, volume 3C, "Intel Processor Trace", with Event Trace (CFE, EVD), and TRIG.  A lexer makes
 * packets of bytes; the decoder makes native events of them.  Neither needs the traced code: branches are only skipped.
 */
#ifndef TRACEDBG_PT_H
#define TRACEDBG_PT_H

#include "decode.h"

/* cffi: begin */
enum pt_type {
	PT_PAD = 0, PT_TNT = 1, PT_TIP = 2, PT_TIP_PGE = 3, PT_TIP_PGD = 4, PT_FUP = 5,
	PT_MODE_EXEC = 6, PT_MODE_TSX = 7, PT_TSC = 8, PT_MTC = 9, PT_CYC = 10, PT_TMA = 11, PT_CBR = 12,
	PT_PIP = 13, PT_VMCS = 14, PT_PSB = 15, PT_PSBEND = 16, PT_OVF = 17, PT_STOP = 18, PT_MNT = 19,
	PT_PTW = 20, PT_EXSTOP = 21, PT_MWAIT = 22, PT_PWRE = 23, PT_PWRX = 24,
	PT_BBP = 25, PT_BIP = 26, PT_BEP = 27, PT_CFE = 28, PT_EVD = 29, PT_TRIG = 30,
	PT_TYPES = 31
};

/* What a packet holds, beside its type.  ip: the IP bit (a FUP with the address follows).
 *   TIP, TIP_PGE, TIP_PGD, FUP   aux IP compression, value the bytes of the address
 *   TNT                          aux number of branches, value their bits, the oldest in the highest
 *   MODE_EXEC, MODE_TSX          value bits 4:0
 *   TSC, MTC, CYC, CBR, MNT, PTW, MWAIT, PWRE, PWRX, VMCS, PIP   value the payload as it stands
 *   TMA                          value CTC, aux the fast counter
 *   BBP                          aux 1: 4-byte items, 0: 8-byte; value the type
 *   BIP                          aux ID, value
 *   CFE                          aux type, value vector
 *   EVD                          aux type, value payload
 *   TRIG                         aux flags (bits 7:5: IP, ICNTV, MULT), value TRBV, ICNT from bit 8 on
 */
struct pt_packet {
	uint64_t offset, value;
	uint16_t aux;
	uint8_t type, size, ip;
	uint8_t reserved[3];
};

/** The packet that data begins with.  block: 0, or 4 or 8 = bytes of an item between BBP and the end of its block.  Returns
 *  its size, 0 if data ends within it.  Errors: FORMAT (no packet begins so). */
int pt_packet(const uint8_t *data, uint64_t size, int block, struct pt_packet *ret);
/** The first PSB in [from, size).  last: nothing follows the data.  Returns its place; size if there is none: bytes from
 *  *keep on can be the beginning of one.  */
uint64_t pt_sync(const uint8_t *data, uint64_t size, uint64_t from, int last, uint64_t *keep);
/** Packets of data from *at on, which is moved behind them, at most cap; *block as above.  Returns how many.  Errors: FORMAT
 *  at *at, if no packet came before. */
int64_t pt_lex(const uint8_t *data, uint64_t size, uint64_t *at, int *block, struct pt_packet *ret, uint64_t cap);

enum pt_damage {
	PT_D_NONE = 0,
	PT_D_PACKET = 1,   /* not a packet */
	PT_D_EVENT = 2,    /* an EVD that does not belong to what follows it */
	PT_D_STATUS = 3,   /* a packet that cannot be in a PSB+ */
	PT_D_CUT = 4       /* the data ends within a packet */
};

enum pt_count {
	PT_N_PACKETS = 0,
	PT_N_PSB = 1,
	PT_N_CFE = 2,      /* control-flow events */
	PT_N_UNKNOWN = 3,  /* of them of an unknown type */
	PT_N_IF = 4,       /* changes of RFLAGS.IF, as events */
	PT_N_OVF = 5,
	PT_N_STOP = 6,
	PT_N_PAUSE = 7,    /* TIP.PGD: what follows lies outside of the filters */
	PT_N_DAMAGE = 8,   /* places */
	PT_N_SKIPPED = 9,  /* bytes outside of packets */
	PT_N_TSC = 10,
	PT_N_ORPHAN = 11,  /* events whose address was announced and did not come */
	PT_N_COUNTS = 12
};

enum { PT_DAMAGES = 20, PT_HISTORY = 16, PT_ROOM = 8 };

/* Texts of marks: the number is one of these plus the vector or type. */
enum pt_mark { PT_M_EXIT = 0, PT_M_SIPI = 256, PT_M_UINTR = 512, PT_M_UIRET = 768, PT_M_UNKNOWN = 769, PT_MARKS = 801 };

struct pt_text { uint64_t at; uint32_t size; uint32_t reserved; };   /* of a mark in the BYTES section; size 0: not there yet */

enum pt_cfe {
	PT_INTR = 1, PT_IRET = 2, PT_SMI = 3, PT_RSM = 4, PT_SIPI = 5, PT_INIT = 6, PT_VMENTRY = 7, PT_VMEXIT = 8,
	PT_VMEXIT_INTR = 9, PT_SHUTDOWN = 10, PT_UINTR = 12, PT_UIRET = 13, PT_SWINTR = 14, PT_SYSCALL = 15
};

/* What an event waits for. */
enum pt_wait { PT_W_NONE = 0, PT_W_FUP = 1, PT_W_TIP = 2 };

struct pt_stream {
	/* Set by the caller. */
	uint32_t ctc_n, ctc_d;    /* TSC ticks = CTC ticks * n / d; 0: MTC packets are not used */
	uint16_t cpu;
	uint8_t mtc_shift;        /* bits of the CTC below those in an MTC packet, at most 15 */
	uint8_t events;           /* known to be a trace with Event Trace: MODE.Exec tells RFLAGS.IF */
	/* For the caller. */
	uint64_t offset;          /* of what is to be taken next, since the beginning of the stream */
	uint64_t counts[12];      /* enum pt_count */
	uint64_t damage_at[20];   /* offsets of the first places */
	uint8_t damage[20];       /* enum pt_damage */
	uint32_t mark;            /* pt_decode(), pt_gap() ended because a text is not there: its number + 1 */
	/* The decoder's own. */
	uint8_t held_type;        /* CFE type of the event that waits for its address, 0 none */
	uint8_t held_vector, wait;/* enum pt_wait */
	uint8_t from_known, to_known;
	uint8_t held_time, held_cr2, held_vmx;   /* time known; EVD of a page fault; bits 0, 1: EVD of reason, qualification */
	uint8_t synced, block, in_psb, enabled, after_ovf, ip_known, tsc_known, tma_known, first_mtc, mtc;
	uint8_t if_known, if_set, mode;   /* mode: 0 none, 2 + IF: a MODE.Exec waits for its address */
	uint8_t cr2_seen, vmx_seen, looking;
	uint8_t reserved[4];
	uint64_t lost_at;         /* offset at which packets could not be read any more */
	uint64_t ip, tsc, tma_tsc, tma_ctc, ctc;
	uint64_t cr2, reason, qualification;
	uint64_t from, to, held_at, held_tsc;    /* from: its FUP; to: the target of its branch; of the held event */
	uint64_t held_data, held_more;           /* CR2 or qualification; reason */
};

/** Decode data from *at on, which is moved behind what was taken; the PT_HISTORY bytes before it must be those that came before
 *  it in the stream (fewer only at its beginning).  last: nothing follows.  Writes at most cap events of 64 bytes, cap at
 *  least PT_ROOM.  Returns how many; s->mark: call again with that text.  Errors: ARG. */
int64_t pt_decode(struct pt_stream *s, const uint8_t *data, uint64_t size, uint64_t *at, int last, const struct pt_text *text,
		  void *ret, uint64_t cap);
/** Say that something is missing here: what waits is written, then a gap.  sync: go on at the next PSB.  As pt_decode(). */
int64_t pt_gap(struct pt_stream *s, int sync, const struct pt_text *text, void *ret, uint64_t cap);
/** Write an event that has waited for its branch since long before `time`: no TIP comes any more.  As pt_decode(). */
int64_t pt_settle(struct pt_stream *s, uint64_t time, const struct pt_text *text, void *ret, uint64_t cap);
/** Time of the event that waits, if that is known; else UINT64_MAX. */
uint64_t pt_waits(const struct pt_stream *s);

struct pt_run {            /* events of one stream, in their order */
	const void *events;
	uint64_t count, at;    /* at: the next one */
	uint64_t key;          /* time of the last one */
	uint64_t open;         /* 1: more will come */
};

/** Events of all runs by time, as far as it does not lie behind limit, at most cap; ends where an open run has no more.
 *  Returns how many.  Errors: ARG. */
int64_t pt_merge(struct pt_run *run, uint32_t runs, uint64_t limit, void *ret, uint64_t cap);
/* cffi: end */

/** Bytes of an item of the block that the stream is in behind a packet (0, 4 or 8), with those before it. */
int pt_block(const struct pt_packet *packet, int block);

#endif
