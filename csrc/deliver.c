/* deliver.c - IDT delivery: which stack, where the frame goes, what it holds (semantics R1-R8), and what follows from it. */
#include "core.h"

#define CONTEXT_BITS (TDB_K_RIP | TDB_K_RSP | TDB_K_RFLAGS | TDB_K_CS | TDB_K_SS)

static bool has_error_code(uint8_t vector)             /* R4 */
{
	return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30;
}

static bool is_fault(uint8_t vector)                   /* R6: stores RFLAGS with RF set */
{
	return vector == 0 || (vector >= 5 && vector <= 7) || (vector >= 10 && vector <= 14) || vector == 16 || vector == 17 ||
	       (vector >= 19 && vector <= 21) || vector == 29 || vector == 30;
}

static bool is_maskable(uint8_t source)
{
	return source == TDB_SRC_FIXED || source == TDB_SRC_EXTINT || source == TDB_SRC_EXTERNAL;
}

/* The stack pointer that the delivery starts from, before alignment (R2). */
static bool choose_base(const struct machine *m, const struct request *rq, const struct tdb_gate *gate, uint64_t *base)
{
	const struct cpu *c = &m->cpu[rq->cpu];
	const struct tdb_tss *tss = c->s.tss >= 0 ? &m->tss[c->s.tss] : NULL;

	if (gate->ist) {
		if (!tss || !(tss->known >> (8 + gate->ist) & 1))
			return false;
		*base = tss->ist[gate->ist];
		return true;
	}
	if (!ctx_knows(&rq->at, TDB_K_CS))
		return false;
	if (rq->at.cs & 3) {               /* the target's CPL is 0 */
		if (!tss || !(tss->known & 1))
			return false;
		*base = tss->rsp[0];
		return true;
	}
	if (!ctx_knows(&rq->at, TDB_K_RSP))
		return false;
	*base = rq->at.rsp;
	return true;
}

static void saved_context(const struct request *rq, bool code, struct tdb_context *ret)
{
	*ret = rq->at;
	if (rq->source == TDB_SRC_SOFT_INT) {
		ret->rip += rq->at.code;
		if (!ctx_knows(&rq->at, TDB_K_CODE))
			ret->known &= ~TDB_K_RIP;
	}
	if (rq->source == TDB_SRC_EXCEPTION && is_fault(rq->vector) && ctx_knows(ret, TDB_K_RFLAGS))
		ret->rflags |= RF;
	if (!code) {
		ret->code = 0;
		ret->known &= ~TDB_K_CODE;
	}
}

bool deliver_place(const struct machine *m, const struct request *rq, struct placement *ret)
{
	const struct cpu *c = &m->cpu[rq->cpu];
	const struct tdb_gate *gate;
	bool maybe = rq->source == TDB_SRC_UNKNOWN && has_error_code(rq->vector);
	bool code = (rq->source == TDB_SRC_EXCEPTION && has_error_code(rq->vector)) || maybe;
	uint64_t base, top, size = code ? 48 : 40;

	if (c->s.idt < 0 || !rq->vector_known)
		return false;
	if (maybe && !ctx_knows(&rq->at, TDB_K_CODE))      /* 40 or 48 bytes: every slot would be a guess */
		return false;
	gate = &m->idt[c->s.idt]->gate[rq->vector];
	if ((gate->flags & (TDB_GATE_KNOWN | TDB_GATE_PRESENT)) != (TDB_GATE_KNOWN | TDB_GATE_PRESENT))
		return false;
	if (gate->type != 0xe && gate->type != 0xf)
		return false;
	if (!choose_base(m, rq, gate, &base) || !is_canonical(base))
		return false;
	top = base & ~15ull;                               /* R3 */
	if (top < size)
		return false;
	*ret = (struct placement){
		.gate = *gate,
		.switched = gate->ist || (rq->at.cs & 3) != 0,
		.cpl_change = ctx_knows(&rq->at, TDB_K_CS) && (rq->at.cs & 3) != 0,
		.frame = {
			.lo = top - size, .hi = top, .entry = rq->event, .clobbered_by = NONE, .finding = NONE,
			.victim = NONE, .cpu = rq->cpu, .vector = rq->vector, .source = rq->source, .ist = gate->ist,
			.status = TDB_FRAME_LIVE, .has_code = code, .gate_type = gate->type,
		},
	};
	saved_context(rq, code, &ret->frame.saved);
	stack_bounds(m->in, stack_key(m->in, top), &ret->frame.stack_lo, &ret->frame.stack_hi);
	return true;
}

/* Store the first `words` words from the top down (R1). */
static int store_frame(struct machine *m, const struct tdb_frame *f, uint64_t words)
{
	const struct tdb_context *s = &f->saved;
	const uint64_t value[6] = { s->ss, s->rsp, s->rflags, s->cs, s->rip, s->code };
	uint32_t known = (s->known & TDB_K_SS ? 1 : 0) | (s->known & TDB_K_RSP ? 2 : 0) | (s->known & TDB_K_RFLAGS ? 4 : 0) |
			 (s->known & TDB_K_CS ? 8 : 0) | (s->known & TDB_K_RIP ? 16 : 0) | (s->known & TDB_K_CODE ? 32 : 0);
	uint32_t count = f->has_code ? 6 : 5;

	return memory_store_down(&m->mem, f->hi, value, known, words < count ? (uint32_t)words : count, f->entry);
}

/* State at the handler's first instruction (R5, R6). */
static void registers_entered(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	c->s.rsp = p->frame.lo;
	c->s.rip = p->gate.offset;
	c->s.cs = p->gate.selector;
	c->s.known |= TDB_CK_RSP | TDB_CK_RIP | TDB_CK_CS;
	if (p->cpl_change || (p->gate.ist && m->in->fidelity & TDB_FID_SS_ZEROED)) {
		c->s.ss = 0;
		c->s.known |= TDB_CK_SS;
	} else if (!ctx_knows(&rq->at, TDB_K_CS)) {
		c->s.known &= ~TDB_CK_SS;
	}
	c->s.rflags &= ~(1u << 8 | 1u << 14 | RF);
	if (p->gate.type == 0xe)
		c->s.rflags &= ~(1u << 9);
}

/* The frame of a delivery; where it went is not known if it could not be placed. */
static struct tdb_frame writer_frame(const struct request *rq, const struct placement *p)
{
	if (p)
		return p->frame;
	return (struct tdb_frame){
		.entry = rq->event, .clobbered_by = NONE, .finding = NONE, .victim = NONE, .cpu = rq->cpu,
		.vector = rq->vector, .source = rq->source, .saved = rq->at,
	};
}

static void raise_fake(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	uint32_t which = rq->vector == VECTOR_MC;
	struct tdb_finding f;

	if (!rq->vector_known || rq->source == TDB_SRC_UNKNOWN || (rq->vector != VECTOR_NMI && rq->vector != VECTOR_MC))
		return;
	if (rq->source == (which ? TDB_SRC_MC : TDB_SRC_NMI))
		return;
	if (c->fake[which][rq->source] != NONE) {
		finding_count_again(m, c->fake[which][rq->source]);
		return;
	}
	f = finding_new(which ? TDB_R_FAKE_MCE : TDB_R_FAKE_NMI, TDB_EV_RECORDED, rq->event, rq->cpu);
	f.writer = writer_frame(rq, p);
	c->fake[which][rq->source] = finding_raise(m, &f);
}

/* What the delivery itself says against the rules; one finding per CPU and kind, then counted. */
static void raise_mismatch(struct machine *m, struct cpu *c, const struct request *rq, uint8_t mismatch)
{
	uint32_t *number = &c->mismatch[mismatch == TDB_MM_NMI_BLOCKED];
	struct tdb_finding f = finding_new(TDB_R_MODEL_MISMATCH, TDB_EV_COMPUTED, rq->event, rq->cpu);

	if (*number != NONE) {
		finding_count_again(m, *number);
		return;
	}
	f.detail = mismatch;
	*number = finding_raise(m, &f);
}

static void raise_simple(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	struct tdb_finding f;

	raise_fake(m, c, rq, p);
	if (rq->vector_known && rq->vector == VECTOR_DF && rq->source == TDB_SRC_EXCEPTION) {
		f = finding_new(TDB_R_DOUBLE_FAULT, TDB_EV_RECORDED, rq->event, rq->cpu);
		f.cause_event = c->failed[0];
		f.cause_frame = c->failed[1];
		f.writer = writer_frame(rq, p);
		finding_raise(m, &f);
	}
	if (is_maskable(rq->source) && ctx_knows(&rq->at, TDB_K_RFLAGS) && !(rq->at.rflags & 1u << 9))
		raise_mismatch(m, c, rq, TDB_MM_IF_CLEAR);
	if (rq->source == TDB_SRC_NMI && m->in->fidelity & TDB_FID_RETURNS && c->s.known & TDB_CK_NMI && c->s.nmi_blocked)
		raise_mismatch(m, c, rq, TDB_MM_NMI_BLOCKED);
}

/* Whether [lo, hi) holds user memory; the ranges are sorted and disjoint. */
static bool in_user_memory(const struct inputs *in, uint64_t lo, uint64_t hi)
{
	uint32_t a = 0, b = in->user_count;

	while (a < b) {                  /* the first range that ends above lo */
		uint32_t mid = (a + b) / 2;

		if (in->user[mid].hi > lo)
			b = mid;
		else
			a = mid + 1;
	}
	return a < in->user_count && in->user[a].lo < hi;
}

static void raise_user_stack(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	enum tdb_evidence ev = TDB_EV_UNKNOWN;
	struct tdb_finding f;

	if (p->switched)
		return;
	if (in_user_memory(m->in, p->frame.lo, p->frame.hi))
		ev = TDB_EV_COMPUTED;
	if (!m->in->user_count && c->s.known & TDB_CK_USER_RSP && !stack_named(stack_key(m->in, p->frame.hi))) {
		uint64_t a = rq->at.rsp, b = c->s.user_rsp;

		if ((a > b ? a - b : b - a) < 4096)
			ev = TDB_EV_INFERRED;
	}
	if (ev == TDB_EV_UNKNOWN)
		return;
	f = finding_new(TDB_R_USER_STACK, ev, rq->event, rq->cpu);
	f.writer = p->frame;
	f.lo = p->frame.lo;
	f.hi = p->frame.hi;
	finding_raise(m, &f);
}

/* Masking that a delivery begins, wherever its frame went (R15, R16, R21). */
static void begin_masking(struct cpu *c, const struct request *rq)
{
	if (rq->source == TDB_SRC_NMI) {
		c->s.known |= TDB_CK_NMI;
		c->s.nmi_blocked = 1;
		c->s.nmi_pending = 0;
		c->s.nmi_since = rq->event;
		c->s.nmi_unblocked_by = NONE;
		c->s.nmi_unblock_frame = NONE;
	} else if (rq->source == TDB_SRC_MC) {
		c->s.known |= TDB_CK_MCIP;
		c->s.mcip = 1;
	}
}

static int apply_failed(struct machine *m, struct cpu *c, const struct request *rq, const struct tdb_event *e)
{
	struct placement p;

	m->stats.failed++;
	c->failed[1] = c->failed[0];
	c->failed[0] = rq->event;
	if (e->known & TDB_K_ADDR && e->addr && deliver_place(m, rq, &p))
		return store_frame(m, &p.frame, e->addr);
	return TDB_OK;
}

int deliver_apply(struct machine *m, const struct tdb_event *e, uint32_t index)
{
	struct cpu *c = &m->cpu[e->cpu];
	struct request rq = {
		.at = { .rip = e->rip, .rsp = e->rsp, .rflags = e->rflags, .code = e->code, .cs = e->cs, .ss = e->ss,
			.known = e->known & (CONTEXT_BITS | TDB_K_CODE) },
		.event = index, .cpu = e->cpu, .vector = e->arg, .vector_known = e->known & TDB_K_ARG,
		.source = e->known & TDB_K_SOURCE && e->source < SOURCES ? e->source : TDB_SRC_UNKNOWN,
	};
	struct placement p;
	struct tdb_cpu before;
	bool placed;
	int status;

	if (e->flags & TDB_F_LEGACY) {
		m->stats.legacy++;
		cpu_set_registers(c, &(struct tdb_context){ 0 });
		return TDB_OK;
	}
	cpu_set_registers(c, &rq.at);
	if (e->flags & TDB_F_FAILED)
		return apply_failed(m, c, &rq, e);
	m->stats.deliveries++;
	observe(m, c, rq.cpu, &rq.at, index);
	placed = deliver_place(m, &rq, &p);
	raise_simple(m, c, &rq, placed ? &p : NULL);
	c->failed[0] = c->failed[1] = NONE;
	if (!placed) {
		m->stats.unjudged++;
		cpu_set_registers(c, &(struct tdb_context){ 0 });
		begin_masking(c, &rq);
		return TDB_OK;
	}
	m->stats.judged++;
	m->stats.ist_deliveries[p.gate.ist & 7]++;
	raise_user_stack(m, c, &rq, &p);
	before = c->s;
	if (p.switched)
		verdict_overwrite(m, &rq, &p, &before);
	status = store_frame(m, &p.frame, 6);
	if (!status)
		status = frame_open(m, &p.frame);
	if (status)
		return status;
	begin_masking(c, &rq);
	registers_entered(m, c, &rq, &p);
	c->placed = index;
	c->placed_gate = p.gate;
	m->last_frame = p.frame;
	return TDB_OK;
}
