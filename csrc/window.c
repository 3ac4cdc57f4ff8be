/* window.c - reentry-window: a frame that an event deliverable now would overwrite, whether it comes or not. */
#include "core.h"

static const struct tdb_gate *usable_gate(const struct machine *m, const struct cpu *c, uint8_t vector)
{
	const struct tdb_gate *gate = c->s.idt < 0 || c->s.fred ? NULL : &m->idt[c->s.idt]->gate[vector];
	const uint8_t usable = TDB_GATE_KNOWN | TDB_GATE_PRESENT;

	return gate && (gate->flags & usable) == usable && gate->ist ? gate : NULL;
}

/* The bytes [*lo, *hi) of V that the next frame of IST n would take. */
static bool next_frame_hits(const struct machine *m, const struct cpu *c, uint8_t n, const struct tdb_frame *v, uint64_t *lo,
			    uint64_t *hi)
{
	const struct tdb_tss *tss = c->s.tss < 0 ? NULL : &m->tss[c->s.tss];
	uint64_t top;

	if (!tss || !(tss->known >> (8 + n) & 1) || !is_canonical(tss->ist[n]))
		return false;
	top = tss->ist[n] & ~15ull;
	if (top < 40 || v->lo >= top || v->hi <= top - 40)
		return false;
	*lo = v->lo > top - 40 ? v->lo : top - 40;
	*hi = v->hi < top ? v->hi : top;
	return true;
}

static bool holds(const struct machine *m, uint64_t at, const uint64_t own[5])
{
	for (uint64_t i = 0; i < 5; i++) {
		uint64_t value;
		uint8_t known;
		uint32_t by;

		memory_load(&m->mem, at + 8 * i, &value, &known, &by);
		if (known != 0xff || value != own[i])
			return false;
	}
	return true;
}

/* Software has put a copy of V's words below it: the next frame does no harm. */
static bool has_copy(const struct machine *m, const struct tdb_frame *v)
{
	const uint64_t own[5] = { v->saved.rip, v->saved.cs, v->saved.rflags, v->saved.rsp, v->saved.ss };
	uint64_t lo = v->lo - 64 * 8;

	if (!saved_knows(v, TDB_K_RIP | TDB_K_CS | TDB_K_RFLAGS | TDB_K_RSP | TDB_K_SS))
		return false;
	if (v->lo < 64 * 8)
		lo = 0;
	for (uint64_t at = v->lo; at > lo;) {              /* by pages */
		uint64_t first = (at - 8) >> PAGE_SHIFT << PAGE_SHIFT;
		const struct page *page = memory_page(&m->mem, first >> PAGE_SHIFT);
		uint32_t begin = first > lo ? 0 : (uint32_t)(lo - first) >> 3;

		for (uint32_t word = (uint32_t)(at - first) >> 3; page && word-- > begin;)
			if (page->value[word] == own[0] && holds(m, first + 8 * word, own))
				return true;
		at = first;
	}
	return false;
}

struct opening {
	enum tdb_hazard kind;
	enum tdb_cause cause;
	uint32_t event, cause_event, cause_frame;
	uint8_t ists;                    /* bit n: IST n */
};

static void look(struct machine *m, struct cpu *c, const struct opening *o, struct node *v)
{
	struct tdb_finding f;
	uint64_t lo, hi;

	if (!o->ists || v->f.status != TDB_FRAME_LIVE || !v->f.ist || v->f.hazards >> o->kind & 1)
		return;
	for (uint8_t n = 1; n < 8; n++) {
		if (!(o->ists >> n & 1) || !next_frame_hits(m, c, n, &v->f, &lo, &hi))
			continue;
		v->f.hazards |= (uint8_t)(1u << o->kind);
		if (has_copy(m, &v->f) || finding_folded(m, c->fold.window[n][o->kind]))
			return;
		f = finding_new(TDB_R_REENTRY_WINDOW, TDB_EV_COMPUTED, o->event, v->f.cpu);
		f.lo = lo;
		f.hi = hi;
		f.victim = v->f;
		f.cause = o->cause;
		f.cause_event = o->cause_event;
		f.cause_frame = o->cause_frame;
		c->fold.window[n][o->kind] = finding_raise(m, &f);
		return;
	}
}

/* The frames on the chain from the CPU's RSP; where returns are recorded, all that interrupted CPL0 too. */
static void look_at_all(struct machine *m, struct cpu *c, uint16_t cpu, const struct opening *o)
{
	bool returns = m->in->fidelity & TDB_FID_RETURNS, marked = false;

	if (!o->ists || m->watch[cpu].tail == NONE)
		return;
	for (uint32_t id = m->watch[cpu].tail; id != NONE; id = m->frames.node[id].watch.prev) {
		struct node *n = frame_at(m, id);

		if (!n->f.ist || n->f.status != TDB_FRAME_LIVE || n->f.hazards >> o->kind & 1)
			continue;
		if (!(returns && saved_knows(&n->f, TDB_K_CS) && !(n->f.saved.cs & 3))) {
			if (!marked && c->s.known & TDB_CK_RSP)
				mark_chain(m, cpu, c->s.rsp, o->event);
			marked = true;
			if (n->mark != o->event)
				continue;
		}
		look(m, c, o, n);
	}
}

static uint8_t ist_of(const struct machine *m, const struct cpu *c, uint8_t vector)
{
	const struct tdb_gate *gate = usable_gate(m, c, vector);

	return gate ? (uint8_t)(1u << gate->ist) : 0;
}

static uint8_t ists_maskable(const struct machine *m, const struct cpu *c)
{
	return c->s.idt < 0 || c->s.fred ? 0 : m->idt[c->s.idt]->ist_maskable;
}

void window_nmi(struct machine *m, struct cpu *c, uint16_t cpu, bool was_unblocked)
{
	struct opening o = { .kind = TDB_HAZARD_NMI, .cause = TDB_CAUSE_NMI_UNBLOCKED, .event = c->s.event };

	if (was_unblocked || !nmi_unblocked(c) || c->s.smm)
		return;
	o.cause_event = c->s.nmi_unblocked_by;
	o.cause_frame = c->s.nmi_unblock_frame;
	o.ists = ist_of(m, c, VECTOR_NMI);
	look_at_all(m, c, cpu, &o);
}

void window_mc(struct machine *m, struct cpu *c, uint16_t cpu, uint32_t event)
{
	struct opening o = { .kind = TDB_HAZARD_MC, .cause = TDB_CAUSE_MC_UNMASKED, .event = event, .cause_event = event,
			     .cause_frame = NONE, .ists = ist_of(m, c, VECTOR_MC) };

	if (!(c->s.known & TDB_CK_MCE) || c->s.mce)
		look_at_all(m, c, cpu, &o);
}

void window_maskable(struct machine *m, struct cpu *c, uint16_t cpu, uint32_t event)
{
	struct opening o = { .kind = TDB_HAZARD_MASKABLE, .cause = TDB_CAUSE_MASKABLE, .event = event, .cause_event = event,
			     .cause_frame = NONE, .ists = ists_maskable(m, c) };

	look_at_all(m, c, cpu, &o);
}

/* At once, before the handler runs; the frame is the one that was opened last. */
void window_delivery(struct machine *m, struct cpu *c, const struct placement *p)
{
	struct node *v = frame_at(m, m->frames.age.head);
	const struct tdb_frame *f = &p->frame;
	bool unknown = f->source == TDB_SRC_UNKNOWN;
	struct opening o = { .event = f->entry, .cause_event = f->entry, .cause_frame = NONE };

	if (f->source != TDB_SRC_NMI && !(unknown && f->vector == VECTOR_NMI) && nmi_unblocked(c)) {
		o.kind = TDB_HAZARD_NMI;
		o.cause = TDB_CAUSE_NMI_NEVER_BLOCKED;
		o.ists = ist_of(m, c, VECTOR_NMI);
		look(m, c, &o, v);
	}
	if (f->source != TDB_SRC_MC && !(unknown && f->vector == VECTOR_MC) && c->s.known & TDB_CK_MCIP && !c->s.mcip &&
	    !(c->s.known & TDB_CK_MCE && !c->s.mce)) {
		o.kind = TDB_HAZARD_MC;
		o.cause = TDB_CAUSE_MC_UNMASKED;
		o.ists = ist_of(m, c, VECTOR_MC);
		look(m, c, &o, v);
	}
	if (c->s.known & TDB_CK_RFLAGS && c->s.rflags & IF) {
		o.kind = TDB_HAZARD_MASKABLE;
		o.cause = TDB_CAUSE_MASKABLE;
		o.ists = ists_maskable(m, c);
		look(m, c, &o, v);
	}
}
