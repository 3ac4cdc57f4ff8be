/* place.c - where the frame of a delivery goes and what it holds: the IDT's rules (R1-R8) and FRED's (R35). */
#include "core.h"

#define CPL(cs) ((cs) & 3)

bool has_error_code(uint8_t vector)                    /* R4 */
{
	return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30;
}

int code_vector(uint8_t vector)
{
	return vector == 8 ? 0 : vector <= 14 ? vector - 9 : vector == 17 ? 6 : vector == 21 ? 7 : vector - 21;
}

static bool is_fault(uint8_t vector)                   /* R6: stores RFLAGS with RF set */
{
	return vector == 0 || (vector >= 5 && vector <= 7) || (vector >= 10 && vector <= 14) || vector == 16 || vector == 17 ||
	       (vector >= 19 && vector <= 21) || vector == 29 || vector == 30;
}

static bool from_software(const struct request *rq)
{
	return rq->source == TDB_SRC_SOFT_INT || rq->source == TDB_SRC_SYSCALL;
}

/* INT1, INT3, INTO: instructions of one byte, treated as exceptions where INT n is not. */
static bool one_byte_int(const struct request *rq)
{
	return rq->source == TDB_SRC_SOFT_INT && ctx_knows(&rq->at, TDB_K_CODE) && rq->at.code == 1 &&
	       (rq->vector == 1 || rq->vector == 3 || rq->vector == 4);
}

static void saved_context(const struct request *rq, bool code, struct tdb_context *ret)
{
	*ret = rq->at;
	if (from_software(rq)) {
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

/* -- IDT ------------------------------------------------------------------------------------------------------------- */

const struct tdb_gate *deliver_gate(const struct machine *m, const struct request *rq)
{
	const struct cpu *c = &m->cpu[rq->cpu];
	const struct tdb_gate *gate;

	if (c->s.idt < 0 || !rq->vector_known)
		return NULL;
	gate = &m->idt[c->s.idt]->gate[rq->vector];
	return gate->flags & TDB_GATE_KNOWN ? gate : NULL;
}

bool deliver_base(const struct machine *m, const struct request *rq, const struct tdb_gate *gate, uint64_t *ret)
{
	const struct cpu *c = &m->cpu[rq->cpu];
	const struct tdb_tss *tss = c->s.tss >= 0 ? &m->tss[c->s.tss] : NULL;

	if (gate->ist) {                                   /* R2 */
		if (!tss || !(tss->known >> (8 + gate->ist) & 1))
			return false;
		*ret = tss->ist[gate->ist];
		return true;
	}
	if (!ctx_knows(&rq->at, TDB_K_CS))
		return false;
	if (CPL(rq->at.cs)) {              /* the target's CPL is 0 */
		if (!tss || !(tss->known & 1))
			return false;
		*ret = tss->rsp[0];
		return true;
	}
	if (!ctx_knows(&rq->at, TDB_K_RSP))
		return false;
	*ret = rq->at.rsp;
	return true;
}

static void push(struct words *w, uint64_t value, bool known)
{
	w->value[w->count] = known ? value : 0;
	w->known[w->count++] = known ? 0xff : 0;
}

static void idt_words(const struct tdb_frame *f, struct words *w)   /* R1 */
{
	const struct tdb_context *s = &f->saved;

	w->count = 0;
	push(w, s->ss, s->known & TDB_K_SS);
	push(w, s->rsp, s->known & TDB_K_RSP);
	push(w, s->rflags, s->known & TDB_K_RFLAGS);
	push(w, s->cs, s->known & TDB_K_CS);
	push(w, s->rip, s->known & TDB_K_RIP);
	if (f->has_code)
		push(w, s->code, s->known & TDB_K_CODE);
}

/* All but `saved` and what IDT and FRED frames differ in.  Field by field: this is the hottest store of all. */
static void frame_start(const struct machine *m, const struct request *rq, uint64_t top, uint64_t size, struct placement *p)
{
	const struct tdb_cpu *c = &m->cpu[rq->cpu].s;
	struct tdb_frame *f = &p->frame;

	f->lo = top - size;
	f->hi = top;
	f->entry = rq->event;
	f->clobbered_by = f->overwritten_by = f->finding = f->victim = NONE;
	f->cpu = rq->cpu;
	f->vector = rq->vector;
	f->source = rq->source;
	f->status = TDB_FRAME_LIVE;
	f->ist = f->fred = f->level = f->from_level = f->hazards = 0;
	f->gs = c->known & TDB_CK_GS ? c->gs : 2;
	memset(f->reserved, 0, sizeof(f->reserved));
	f->depth = m->cpu[rq->cpu].depth;
	f->reserved2 = 0;
	f->ring_gap = c->ring_gap != NONE && in_ring_gap(&m->cpu[rq->cpu], &rq->at) ? c->ring_gap : NONE;
	p->key = stack_key(m->in, top);
	stack_bounds(m->in, p->key, &f->stack_lo, &f->stack_hi);
}

static bool place_idt(const struct machine *m, const struct request *rq, struct placement *ret)
{
	const struct tdb_gate *gate = deliver_gate(m, rq);
	bool maybe = rq->source == TDB_SRC_UNKNOWN && has_error_code(rq->vector);
	bool code = (rq->source == TDB_SRC_EXCEPTION && has_error_code(rq->vector)) || maybe;
	uint64_t base, top, size = code ? 48 : 40;

	if (!gate || !(gate->flags & TDB_GATE_PRESENT) || (gate->type != 0xe && gate->type != 0xf))
		return false;
	if (maybe && !ctx_knows(&rq->at, TDB_K_CODE))      /* 40 or 48 bytes: every slot would be a guess */
		return false;
	if (!deliver_base(m, rq, gate, &base) || !is_canonical(base))
		return false;
	top = base & ~15ull;                               /* R3 */
	if (top < size)
		return false;
	frame_start(m, rq, top, size, ret);
	ret->frame.ist = gate->ist;
	ret->frame.has_code = code;
	ret->frame.gate_type = gate->type;
	saved_context(rq, code, &ret->frame.saved);
	idt_words(&ret->frame, &ret->words);
	ret->handler = gate->offset;
	ret->selector = gate->selector;
	ret->cpl_change = ctx_knows(&rq->at, TDB_K_CS) && CPL(rq->at.cs);
	ret->switched = gate->ist || ret->cpl_change;
	return true;
}

/* -- FRED ------------------------------------------------------------------------------------------------------------ */

/* The level that the event asks for, from CPL0. */
static bool event_level(const struct tdb_fred *fred, const struct request *rq, uint32_t *ret)
{
	switch (rq->source) {
	case TDB_SRC_FIXED:
	case TDB_SRC_EXTINT:
	case TDB_SRC_EXTERNAL:
	case TDB_SRC_INJECTED:
		*ret = fred->config >> 9 & 3;
		return true;
	case TDB_SRC_SYSCALL:
		*ret = 0;
		return true;
	case TDB_SRC_SOFT_INT:
		if (!one_byte_int(rq)) {
			*ret = 0;
			return true;
		}
		break;
	default:
		break;
	}
	if (!(fred->known & TDB_FK_STKLVLS) || rq->vector >= 32)
		return false;
	*ret = fred->stklvls >> (2 * rq->vector) & 3;
	return true;
}

static uint8_t event_type(const struct request *rq)
{
	switch (rq->source) {
	case TDB_SRC_NMI:
		return 2;
	case TDB_SRC_EXCEPTION:
	case TDB_SRC_MC:
		return 3;
	case TDB_SRC_SOFT_INT:
		return !one_byte_int(rq) ? 4 : rq->vector == 1 ? 5 : 6;
	case TDB_SRC_SYSCALL:
		return 7;
	default:
		return 0;
	}
}

static struct words fred_words(const struct cpu *c, const struct request *rq, const struct tdb_frame *f)
{
	const struct tdb_context *s = &f->saved;
	bool no_data = rq->source != TDB_SRC_NMI &&
		       !(rq->source == TDB_SRC_EXCEPTION && (rq->vector == 1 || rq->vector == 7 || rq->vector == 14));
	uint64_t info = c->s.shadow == 1;
	struct words w;

	info |= from_software(rq) && !one_byte_int(rq) ? 2 : rq->source == TDB_SRC_NMI ? 4 : 0;
	info |= (uint64_t)rq->vector << 16 | (uint64_t)event_type(rq) << 32;
	w.count = 0;
	push(&w, 0, true);
	push(&w, rq->data_known ? rq->data : 0, rq->data_known || no_data);
	w.value[w.count] = info << 16 | (s->known & TDB_K_SS ? s->ss : 0);
	w.known[w.count++] = s->known & TDB_K_SS ? 0x7f : 0x7c;
	push(&w, s->rsp, s->known & TDB_K_RSP);
	push(&w, s->rflags, s->known & TDB_K_RFLAGS);
	w.value[w.count] = s->cs | (uint64_t)f->from_level << 16;
	w.known[w.count++] = 7;
	push(&w, s->rip, s->known & TDB_K_RIP);
	push(&w, s->code, s->known & TDB_K_CODE);
	return w;
}

static bool place_fred(const struct machine *m, const struct request *rq, struct placement *ret)
{
	const struct cpu *c = &m->cpu[rq->cpu];
	const struct tdb_fred *fred = &c->s.levels;
	bool user, code = rq->source == TDB_SRC_EXCEPTION && has_error_code(rq->vector);
	bool nested = rq->source == TDB_SRC_EXCEPTION && (rq->vector == VECTOR_DF || c->failed[rq->event == c->failed[0]] != NONE);
	uint32_t level, from = 0;
	uint64_t base, top;

	if (rq->source == TDB_SRC_UNKNOWN || !rq->vector_known || !ctx_knows(&rq->at, TDB_K_CS) || !(fred->known & TDB_FK_CONFIG))
		return false;
	if (rq->source == TDB_SRC_SOFT_INT && (rq->vector == 1 || rq->vector == 3 || rq->vector == 4) && !ctx_knows(&rq->at, TDB_K_CODE))
		return false;
	user = CPL(rq->at.cs) == 3;
	if (!user && CPL(rq->at.cs))
		return false;
	if (user && !nested)
		level = 0;
	else if (!event_level(fred, rq, &level))
		return false;
	if (!user && !(c->s.known & TDB_CK_CSL))
		return false;
	if (!user)
		from = c->s.csl;
	if (level < from)
		level = from;
	if (user || level > from) {
		if (!(fred->known >> level & 1))
			return false;
		base = fred->rsp[level];
	} else {
		if (!ctx_knows(&rq->at, TDB_K_RSP))
			return false;
		base = rq->at.rsp - (fred->config & 0x1c0);
	}
	top = base & ~63ull;
	if (!is_canonical(base) || top < 64)
		return false;
	frame_start(m, rq, top, 64, ret);
	ret->frame.fred = 1;
	ret->frame.has_code = 1;
	ret->frame.level = (uint8_t)level;
	ret->frame.from_level = (uint8_t)from;
	ret->frame.gate_type = 0xe;
	saved_context(rq, true, &ret->frame.saved);
	if (!code) {
		ret->frame.saved.code = 0;
		ret->frame.saved.known |= TDB_K_CODE;
	}
	ret->words = fred_words(c, rq, &ret->frame);
	ret->handler = (fred->config & ~0xfffull) + (user ? 0 : 256);
	ret->selector = 0;
	ret->cpl_change = user;
	ret->switched = user || level > from;
	return true;
}

bool deliver_place(const struct machine *m, const struct request *rq, struct placement *ret)
{
	return m->cpu[rq->cpu].s.fred ? place_fred(m, rq, ret) : place_idt(m, rq, ret);
}
