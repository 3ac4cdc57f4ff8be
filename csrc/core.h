/*
 * core.h - private structures of the replay core.  The rules themselves are defined in tracedbg/help/replay.md.
 *
 * One `machine` is the whole state at a position.  A replay holds two of them, the forward scan and the view, over shared
 * read-only inputs; stack pages and IDTs are reference-counted and copied when written (snapshots share them).
 */
#ifndef TRACEDBG_CORE_H
#define TRACEDBG_CORE_H

#include <stdbool.h>
#include <string.h>

#include "tdb.h"

_Static_assert(sizeof(struct tdb_event) == 64, "the wire record is 64 bytes");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire format is little-endian");

#define NONE UINT32_MAX              /* no event, no frame, no finding */
#define VECTOR_NMI 2
#define VECTOR_DF 8
#define VECTOR_MC 18
#define FRAMES_PER_STACK 64
#define WATCHED_PER_CPU 256          /* open frames of a CPU on IST or per-CPU stacks */
#define CHAIN_LIMIT 64
#define WRITE_LIMIT 4096             /* bytes of one write event */
#define SOURCES 10
#define RF (1u << 16)
#define IF (1u << 9)
#define CONSUMED_KEPT 8               /* frames that returns of a CPU consumed last */
#define CODE_VECTORS 10               /* vectors with an error code */
#define REGISTERS_KNOWN (TDB_CK_RIP | TDB_CK_RSP | TDB_CK_CS | TDB_CK_SS | TDB_CK_RFLAGS)

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* -- inputs shared by all machines of a replay ------------------------------------------------------------------ */

#define STACK_CACHE 64

/* Addresses in (lo, hi] belong to the stack `key`: the last answers of stack_key(). */
struct stack_cache { uint64_t lo, hi, key; };

struct inputs {
	struct tdb_config cfg;
	const struct tdb_event *events;
	uint64_t count;
	const uint8_t *bytes;
	uint64_t bytes_size;
	uint32_t cpus;
	uint32_t fidelity;
	uint32_t tss_count, idt_count;
	uint32_t stack_count;            /* named stacks, sorted by hi */
	uint32_t user_count;             /* sorted, disjoint */
	struct tdb_stack *stack;
	uint64_t *stack_top;             /* hi of each, for the binary search */
	struct tdb_region *user;
	struct stack_cache *stack_cache; /* the only part that changes: a handle has one thread */
};

/* -- stack memory (memory.c) -------------------------------------------------------------------------------------- */

#define PAGE_SHIFT 12
#define PAGE_WORDS 512
#define WRITER_SPLIT (UINT32_MAX - 1)  /* the writers of this word differ: see split */

struct page {
	uint32_t refs;
	uint32_t stamp;                  /* last event that wrote it */
	uint64_t index;                  /* address >> PAGE_SHIFT */
	uint32_t (*split)[8];            /* PAGE_WORDS x 8 writers, or NULL */
	uint64_t value[PAGE_WORDS];
	uint32_t writer[PAGE_WORDS];
	uint8_t known[PAGE_WORDS];
};

/* What a delivery pushes, in the order of the pushes; bit b of known: byte b, unknown bytes are 0. */
struct words {
	uint64_t value[8];
	uint8_t known[8];
	uint32_t count;
};

struct memory {
	struct page **slot;              /* open addressing by page index */
	uint32_t capacity, count, limit;
	uint64_t forgotten;
	uint64_t seed;                   /* of the hash; where a page stands shows nowhere */
	uint64_t *bytes;                 /* of all pages of the replay */
};

int memory_init(struct memory *mem, uint32_t limit, uint64_t seed, uint64_t *bytes);
void memory_deinit(struct memory *mem);
int memory_copy(struct memory *to, const struct memory *from);
void memory_clear(struct memory *mem);
/* Store one byte-granular range; bytes NULL: the bytes become unknown.  Wraps past 2^64 are cut. */
int memory_store(struct memory *mem, uint64_t addr, const uint8_t *bytes, uint32_t length, uint32_t writer);
/* Store an aligned word; bit b of known: byte b is known, an unknown byte is 0 in value. */
int memory_store_word(struct memory *mem, uint64_t addr, uint64_t value, uint8_t known, uint32_t writer);
/* Store aligned words downwards from top. */
int memory_store_down(struct memory *mem, uint64_t top, const struct words *words, uint32_t writer);
/* Read a word of any alignment: value, known mask, and the writer of its lowest byte. */
void memory_load(const struct memory *mem, uint64_t addr, uint64_t *value, uint8_t *known, uint32_t *writer);
const struct page *memory_page(const struct memory *mem, uint64_t index);
uint32_t page_writer(const struct page *page, uint32_t word, uint32_t byte);

/* -- frames (frame.c) ---------------------------------------------------------------------------------------------- */

struct link { uint32_t prev, next; };

struct node {
	struct tdb_frame f;
	uint64_t key;                    /* stack of hi */
	uint64_t saved_key;              /* stack of the saved RSP, if that is known */
	struct link stack, age, watch, mine;  /* newest first: `next` is older; mine: all of its CPU */
	uint32_t mark;                   /* the delivery whose chain it was found on */
	uint8_t watched;                 /* in its CPU's watch list: on an IST or a per-CPU stack */
};

struct list { uint32_t head, tail, count; };  /* head: newest */

struct anon { uint64_t key; struct list list; };

struct frames {
	struct node *node;
	uint32_t capacity, used, free, count, limit;
	struct list age;
	struct list *named;              /* by named stack */
	struct anon *anon;               /* open addressing by key; list.count 0: empty slot */
	uint64_t seed;
	uint32_t anon_capacity, anon_count;
};

/* -- the journal (journal.c) ---------------------------------------------------------------------------------------- */

struct journal {
	struct tdb_life *item;
	uint64_t count, taken, capacity; /* [taken, count) is still to be taken */
	int status;                      /* TDB_E_NOMEM after a failed allocation */
};

/* A frame ends with the event.  Out of line: nearly nobody asks. */
__attribute__((noinline, cold)) void journal_end(struct journal *j, const struct tdb_frame *f, uint32_t event, enum tdb_settle why);

/* -- the machine ------------------------------------------------------------------------------------------------------ */

struct gates {
	uint32_t refs;
	uint8_t ist_maskable;            /* bit n: a gate 2, 18 or 32-255 uses IST n */
	uint64_t base;
	struct tdb_gate gate[256];
};

/* Findings that are raised once and then counted, by number; NONE: not yet. */
struct folds {
	uint32_t fake[2][SOURCES];       /* fake-nmi, fake-mce by source */
	uint32_t mismatch[11];           /* by the bit of enum tdb_mismatch */
	uint32_t illegal[16];            /* by vector */
	uint32_t held[16];               /* by vector - 16 */
	uint32_t code[CODE_VECTORS];     /* error-code-mismatch at a delivery */
	uint32_t window[8][3];           /* by IST and enum tdb_hazard */
	uint32_t shifted[33];            /* error-code-mismatch at a return, by vector, 32: all above */
	uint32_t nmi_lost, unmatched;
	uint32_t overflow;               /* of overflow_key alone */
	uint64_t overflow_key;
};

/* What is known of NMI blocking. */
struct nmi {
	bool known, blocked;
	uint32_t since, unblocked_by, unblock_frame;
};

enum known_msr { MSR_STAR, MSR_LSTAR, MSR_FMASK, MSR_SYSENTER_CS, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSRS };

struct cpu {
	struct tdb_cpu s;
	uint64_t home;                   /* the stack that RSP was last set to, or NO_STACK */
	uint64_t msr[MSRS];
	uint32_t msr_known;
	uint32_t failed[2];              /* the last failed deliveries since a successful one: [0] newest */
	uint64_t loop_rsp, loop_rip, loop_sp;
	uint32_t loop_finding, loop_victim;
	uint32_t placed;                 /* the last event of this CPU was a placed delivery: its index, else NONE */
	uint64_t ring_rsp;               /* RSP in the ring gap */
	bool ring_rsp_known;
	bool stuck;                      /* nmi-stuck was raised for this blocking */
	bool mcip_told;                  /* the trace has this CPU's writes of MCG_STATUS */
	uint8_t token_reported;          /* bit n: token-busy of IST n since the last successful delivery */
	uint32_t ring_mov_ss;            /* the shadow event of MOV SS that the SYSCALL stood in, or NONE */
	uint32_t shadow_event;
	uint32_t smm_iret;               /* the last IRET in SMM, or NONE */
	struct nmi smm_nmi;              /* kept aside while in SMM */
	uint32_t consumed[CONSUMED_KEPT];
	uint32_t consumed_at;
	uint32_t depth;                  /* deliveries that no return has come for */
	struct folds fold;
};

#define NO_STACK UINT64_MAX

struct machine {
	const struct inputs *in;
	struct findings *sink;           /* the scan records findings here; NULL in the view */
	struct journal *journal;         /* and the ends of frames here, if somebody asked for them */
	uint64_t position;
	uint32_t finding_count;          /* raised so far */
	struct cpu *cpu;
	struct list *watch, *mine;       /* by CPU: frames on IST or per-CPU stacks, all frames */
	struct tdb_tss *tss;
	struct gates **idt;
	struct memory mem;
	struct frames frames;
	bool any_fred;                   /* a FRED frame was opened at some time */
	struct tdb_stats stats;
};

struct findings {
	struct tdb_finding *item;
	uint32_t count, capacity, limit;
	int status;                      /* TDB_E_NOMEM after a failed allocation */
};

int machine_init(struct machine *m, const struct inputs *in, const struct tdb_layout *layout, uint64_t *bytes);
void machine_deinit(struct machine *m);
/* Count an event that makes no sense: it is skipped. */
static inline void machine_refuse(struct machine *m)
{
	if (!m->stats.bad_events++)
		m->stats.first_bad = m->position - 1;
}
/* Apply the event at m->position and go on by one. */
int machine_apply(struct machine *m);

/* -- stacks (stack.c) --------------------------------------------------------------------------------------------- */

#define KEY_ANON (1ull << 63)

/* The stack of an address: the index of a named one, or KEY_ANON | block. */
uint64_t stack_key(const struct inputs *in, uint64_t addr);
void stack_bounds(const struct inputs *in, uint64_t key, uint64_t *lo, uint64_t *hi);
static inline bool stack_named(uint64_t key) { return !(key & KEY_ANON); }
static inline bool stack_per_cpu(const struct inputs *in, uint64_t key)
{
	return stack_named(key) && in->stack[key].slot != 0;
}

int frames_init(struct frames *fr, const struct inputs *in);
void frames_deinit(struct frames *fr);
void frames_reset(struct machine *m);
struct list *frames_on(const struct frames *fr, uint64_t key);
static inline struct node *frame_at(const struct machine *m, uint32_t id) { return id == NONE ? NULL : &m->frames.node[id]; }
/* Open a frame on the stack `key`. */
int frame_open(struct machine *m, const struct tdb_frame *f, uint64_t key);
/* Close a frame; counts the reason for IST frames. */
void frame_close(struct machine *m, struct node *n, enum tdb_settle why);
struct node *frame_of_entry(const struct machine *m, uint64_t key, uint32_t entry);
static inline uint64_t frame_rip_addr(const struct tdb_frame *f) { return f->hi - (f->fred ? 56 : 40); }
/* Stored through an IST gate or at a raised FRED level. */
static inline bool frame_dedicated(const struct tdb_frame *f) { return f->ist || f->level > f->from_level; }
static inline void frame_overwritten(struct tdb_frame *f, uint32_t by)
{
	if (f->overwritten_by == NONE)
		f->overwritten_by = by;
	f->clobbered_by = by;
}
/* A guest's event: by its tables, on its stacks. */
static inline bool in_guest(const struct machine *m, const struct cpu *c)
{
	return unlikely(c->s.guest) && m->in->fidelity & TDB_FID_GUESTS;
}
static inline bool saved_knows(const struct tdb_frame *f, uint32_t bits) { return (f->saved.known & bits) == bits; }

/* -- rules ---------------------------------------------------------------------------------------------------------- */

/* What a delivery asks for; no trace in it. */
struct request {
	struct tdb_context at;           /* the interrupted context; known bits as in the event */
	uint32_t event;
	uint16_t cpu;
	uint8_t vector, source;
	bool vector_known;
	bool data_known;                 /* event data: CR2, DR6 */
	uint64_t data;
};

/* Where the frame of a request would go and what it would hold. */
struct placement {
	struct tdb_frame frame;
	struct words words;
	uint64_t key;                    /* the frame's stack */
	uint64_t handler;
	uint16_t selector;               /* IDT only */
	bool switched;                   /* to an IST stack, RSP0 or a FRED stack */
	bool cpl_change;
};

/* Which facts about a vector the manual gives (place.c). */
bool has_error_code(uint8_t vector);
int code_vector(uint8_t vector);         /* its number among those with an error code */
/* The gate of a request and the stack pointer before alignment (R2). */
const struct tdb_gate *deliver_gate(const struct machine *m, const struct request *rq);
bool deliver_base(const struct machine *m, const struct request *rq, const struct tdb_gate *gate, uint64_t *ret);
bool deliver_place(const struct machine *m, const struct request *rq, struct placement *ret);
/* What the delivery itself says against the rules (contradict.c). */
void contradict(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p);
static inline bool is_maskable(uint8_t source)
{
	return source == TDB_SRC_FIXED || source == TDB_SRC_EXTINT || source == TDB_SRC_EXTERNAL;
}

/* The interrupted RSP is that of the ring gap. */
static inline bool in_ring_gap(const struct cpu *c, const struct tdb_context *at)
{
	return c->s.ring_gap != NONE && c->ring_rsp_known && at->known & TDB_K_RSP && at->rsp == c->ring_rsp;
}

/* The registers of a context; what it does not know is unknown. */
void cpu_set_registers(struct cpu *c, const struct tdb_context *at);
void cpu_forget_registers(struct cpu *c);
/* The home stack is the one of the CPU's RSP. */
void cpu_come_home(const struct machine *m, struct cpu *c);
int deliver_apply(struct machine *m, const struct tdb_event *e, uint32_t index);
/* What is known of a delivery from its record alone. */
struct tdb_frame frame_of_event(const struct machine *m, uint32_t index);
/* NMI blocking begins (R15, R16). */
void nmi_block(struct cpu *c, uint32_t since);
int resume_apply(struct machine *m, const struct tdb_event *e, uint32_t index);
/* Returns that no open frame explains (misreturn.c); find_shifted gives the frame that one was meant for. */
struct node *find_shifted(const struct machine *m, const struct tdb_event *e);
void raise_shifted(struct machine *m, struct cpu *c, const struct tdb_frame *f, const struct tdb_event *e, uint32_t index);
void raise_unmatched(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index);
struct tdb_context popped_context(const struct tdb_event *e);
/* SYSCALL, SYSENTER, SYSRET (ring.c). */
void ring_apply(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index);
/* Tables and registers of the system (system.c). */
void system_tss(struct machine *m, const struct cpu *c, const struct tdb_event *e);
int system_gate(struct machine *m, const struct cpu *c, const struct tdb_event *e);
void system_ltr(const struct machine *m, struct cpu *c, const struct tdb_event *e);
void system_lidt(const struct machine *m, struct cpu *c, const struct tdb_event *e);
void system_msr(struct cpu *c, const struct tdb_event *e);
void system_cr(struct cpu *c, const struct tdb_event *e);
/* Compute what a table's gates have in common. */
void gates_summarize(struct gates *g);
/* Requests and shadow-stack tokens (request.c). */
void request_raised(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index);
void raise_illegal(struct machine *m, struct cpu *c, uint8_t vector, uint32_t index, uint16_t cpu, const struct tdb_frame *writer);
void token_event(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index);
void raise_token(struct machine *m, struct cpu *c, uint8_t ist, enum tdb_evidence ev, uint32_t index, uint16_t cpu,
		 const struct tdb_frame *writer);
/* Reentry windows (window.c). */
void window_delivery(struct machine *m, struct cpu *c, const struct placement *p);
void window_nmi(struct machine *m, struct cpu *c, uint16_t cpu, bool was_unblocked);
void window_mc(struct machine *m, struct cpu *c, uint16_t cpu, uint32_t event);
void window_maskable(struct machine *m, struct cpu *c, uint16_t cpu, uint32_t event);
/* Stacks that are left through the bottom (overflow.c). */
void overflow_delivery(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p);
void overflow_write(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index, const uint8_t *bytes,
		    uint32_t length);

/* What an interrupted context shows about open frames (observe.c). */
void observe(struct machine *m, struct cpu *c, uint16_t cpu, const struct tdb_context *at, uint32_t event);
/* In an outer ring; *since (or NULL): the frame of the delivery that blocked NMIs if it was closed by this, else entry NONE.
 * unblocks: that the ring was left shows an IRET, where returns are not recorded. */
void observe_outer(struct machine *m, uint16_t cpu, uint32_t event, bool unblocks, struct tdb_frame *since);
/* nmi-stuck, where NMIs are known to be blocked, once; f->entry NONE: no victim. */
void raise_stuck(struct machine *m, struct cpu *c, uint16_t cpu, uint32_t event, enum tdb_evidence ev, const struct tdb_frame *f);

/* Findings (verdict.c). */
void verdict_overwrite(struct machine *m, const struct request *rq, struct placement *p, const struct nmi *before, bool failed);
/* Slots of the victim that words pushed down from hi cover, and those of them whose memory does not keep its value. */
void compare_words(const struct machine *m, const struct tdb_frame *victim, uint64_t hi, const struct words *words,
		   uint8_t *slots, uint8_t *differ);
static inline uint64_t slot_addr(const struct tdb_frame *f, int slot)
{
	return slot == 5 ? frame_rip_addr(f) - 8 : frame_rip_addr(f) + 8 * (uint64_t)slot;
}
/* Mark the frames that must be live because each one's context leads to the next (chain.c). */
void mark_chain(struct machine *m, uint16_t cpu, uint64_t cur, uint32_t mark);
/* Whether the chain from cur leads to the frame of an entry. */
bool on_chain(const struct machine *m, uint16_t cpu, uint64_t cur, uint32_t entry);
/* A finding that is raised once: true and counted again if it was raised as `number`, false for NONE. */
bool finding_folded(struct machine *m, uint32_t number);
uint32_t finding_raise(struct machine *m, const struct tdb_finding *f);
struct tdb_finding finding_new(enum tdb_rule rule, enum tdb_evidence ev, uint32_t event, uint16_t cpu);
void finding_settle(struct machine *m, uint32_t number, enum tdb_rule rule, enum tdb_evidence ev, uint32_t event,
		    enum tdb_settle by);
/* What became of it cannot be known: its frame was dropped. */
void finding_lost(struct machine *m, uint32_t number, uint32_t event);
void finding_consumed(struct machine *m, uint32_t number, uint32_t event, const struct tdb_context *popped);
void finding_count_again(struct machine *m, uint32_t number);

/* A hash that a trace cannot choose collisions for. */
static inline uint32_t mix(uint64_t key, uint64_t seed)
{
	key = (key ^ seed) * 0x9e3779b97f4a7c15ull;
	key = (key ^ key >> 32) * 0xd6e8feb86659fd93ull;
	return (uint32_t)(key >> 32);
}

static inline bool ctx_knows(const struct tdb_context *c, uint32_t bits) { return (c->known & bits) == bits; }
/* SDM Vol. 1 3.3.7.1, with the 57 bits of 5-level paging: a trace need not tell which paging is on. */
static inline bool is_canonical(uint64_t a) { return (a + (1ull << 56)) >> 57 == 0; }

static inline void nmi_unblock(struct cpu *c, uint32_t event, uint32_t frame)
{
	c->s.known |= TDB_CK_NMI;
	c->s.nmi_blocked = 0;
	c->s.nmi_unblocked_by = event;
	c->s.nmi_unblock_frame = frame;
	c->stuck = false;
}

static inline struct nmi nmi_state(const struct cpu *c)
{
	return (struct nmi){ .known = c->s.known & TDB_CK_NMI, .blocked = c->s.nmi_blocked, .since = c->s.nmi_since,
			     .unblocked_by = c->s.nmi_unblocked_by, .unblock_frame = c->s.nmi_unblock_frame };
}

static inline bool nmi_unblocked(const struct cpu *c) { return c->s.known & TDB_CK_NMI && !c->s.nmi_blocked; }
static inline void cpu_set_known(struct cpu *c, uint32_t bit, bool known)
{
	c->s.known = known ? c->s.known | bit : c->s.known & ~bit;
}

/* -- snapshots (snapshot.c) ----------------------------------------------------------------------------------------- */

struct snapshot;

struct snapshots {
	struct snapshot **item;
	uint32_t count, capacity, limit, interval;
	uint64_t own_bytes;              /* of the snapshots without their pages */
	uint64_t max_bytes;
};

int snapshots_init(struct snapshots *s, const struct tdb_config *cfg);
void snapshots_deinit(struct snapshots *s);
/* Take one if the machine stands at a multiple of the interval and beyond the last one, and there is room for it. */
void snapshots_take(struct snapshots *s, const struct machine *m);
/* Bring a machine to the newest snapshot at or before position; false: there is none better than where it stands. */
int snapshots_restore(const struct snapshots *s, struct machine *m, uint64_t position);

/* -- timeline (timeline.c) ------------------------------------------------------------------------------------------ */

/* Cells by stretch, then CPU; the last column is what belongs to no CPU. */
struct timeline {
	struct tdb_bucket *cell, *now;   /* now: the stretch that the scan is in */
	uint64_t end;                    /* of that stretch */
	uint32_t columns, cells, shift;  /* cells: by CPU */
	uint32_t raised;                 /* findings counted so far */
};

int timeline_init(struct timeline *t, uint32_t cpus);
void timeline_deinit(struct timeline *t);
/* The scan has applied the first event of a stretch. */
void timeline_begin(struct timeline *t, const struct machine *m);
/* It has applied a delivery or gap, or raised a finding. */
void timeline_note(struct timeline *t, const struct machine *m, const struct tdb_event *e);

struct tdb_replay {
	struct inputs in;
	struct machine scan, view;
	struct timeline timeline;
	struct findings findings;
	struct journal journal;
	struct snapshots snapshots;
	uint64_t page_bytes;
	int broken;                      /* a status that ends all work: TDB_E_NOMEM */
};

#endif
