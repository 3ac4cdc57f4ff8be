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
#define SOURCES 9
#define RF (1u << 16)

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
/* Store an aligned word. */
int memory_store_word(struct memory *mem, uint64_t addr, uint64_t value, bool known, uint32_t writer);
/* Store count aligned words downwards from top; bit i of `known`: value[i] is known. */
int memory_store_down(struct memory *mem, uint64_t top, const uint64_t *value, uint32_t known, uint32_t count, uint32_t writer);
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

/* -- the machine ------------------------------------------------------------------------------------------------------ */

struct gates {
	uint32_t refs;
	uint64_t base;
	struct tdb_gate gate[256];
};

struct cpu {
	struct tdb_cpu s;
	uint32_t failed[2];              /* the last failed deliveries since a successful one: [0] newest */
	uint32_t fake[2][SOURCES];       /* findings fake-nmi, fake-mce by source */
	uint64_t loop_rsp, loop_rip, loop_sp;
	uint32_t loop_finding;
	uint32_t mismatch[2];            /* findings model-mismatch at deliveries: IF clear, NMIs blocked */
	uint32_t placed;                 /* the last event of this CPU was a placed delivery: its index, else NONE */
	struct tdb_gate placed_gate;
};

struct machine {
	const struct inputs *in;
	struct findings *sink;           /* the scan records findings here; NULL in the view */
	uint64_t position;
	uint32_t finding_count;          /* raised so far */
	struct cpu *cpu;
	struct list *watch, *mine;       /* by CPU: frames on IST or per-CPU stacks, all frames */
	struct tdb_tss *tss;
	struct gates **idt;
	struct memory mem;
	struct frames frames;
	struct tdb_stats stats;
	struct tdb_frame last_frame;     /* of the last applied event; entry NONE: none */
};

struct findings {
	struct tdb_finding *item;
	uint32_t count, capacity, limit;
	int status;                      /* TDB_E_NOMEM after a failed allocation */
};

int machine_init(struct machine *m, const struct inputs *in, const struct tdb_layout *layout, uint64_t *bytes);
void machine_deinit(struct machine *m);
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
/* Open a frame; its stack keys are computed here. */
int frame_open(struct machine *m, const struct tdb_frame *f);
/* Close a frame; counts the reason for IST frames. */
void frame_close(struct machine *m, struct node *n, enum tdb_settle why);
struct node *frame_of_entry(const struct machine *m, uint64_t key, uint32_t entry);
static inline uint64_t frame_rip_addr(const struct tdb_frame *f) { return f->hi - 40; }
static inline bool saved_knows(const struct tdb_frame *f, uint32_t bits) { return (f->saved.known & bits) == bits; }

/* -- rules ---------------------------------------------------------------------------------------------------------- */

/* What a delivery asks for; no trace in it. */
struct request {
	struct tdb_context at;           /* the interrupted context; known bits as in the event */
	uint32_t event;
	uint16_t cpu;
	uint8_t vector, source;
	bool vector_known;
};

/* Where the frame of a request would go and what it would hold (R1-R8). */
struct placement {
	struct tdb_frame frame;
	struct tdb_gate gate;
	bool switched;                   /* to an IST stack or RSP0 */
	bool cpl_change;
};

bool deliver_place(const struct machine *m, const struct request *rq, struct placement *ret);
/* The registers of a context; what it does not know is unknown. */
void cpu_set_registers(struct cpu *c, const struct tdb_context *at);
int deliver_apply(struct machine *m, const struct tdb_event *e, uint32_t index);
int resume_apply(struct machine *m, const struct tdb_event *e, uint32_t index);

/* What an interrupted context shows about open frames (observe.c). */
void observe(struct machine *m, struct cpu *c, uint16_t cpu, const struct tdb_context *at, uint32_t event);
void observe_outer(struct machine *m, uint16_t cpu, uint32_t event);

/* Findings (verdict.c). */
void verdict_overwrite(struct machine *m, const struct request *rq, struct placement *p, const struct tdb_cpu *before);
uint32_t finding_raise(struct machine *m, const struct tdb_finding *f);
struct tdb_finding finding_new(enum tdb_rule rule, enum tdb_evidence ev, uint32_t event, uint16_t cpu);
void finding_settle(struct machine *m, uint32_t number, enum tdb_rule rule, enum tdb_evidence ev, uint32_t event,
		    enum tdb_settle by);
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

struct tdb_replay {
	struct inputs in;
	struct machine scan, view;
	struct findings findings;
	struct snapshots snapshots;
	uint64_t page_bytes;
	int broken;                      /* a status that ends all work: TDB_E_NOMEM */
};

#endif
