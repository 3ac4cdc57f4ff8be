/* deliver.c - deliveries: what follows from one, in the order of help/replay.md. */
#include "core.h"

#define CONTEXT_BITS (TDB_K_RIP | TDB_K_RSP | TDB_K_RFLAGS | TDB_K_CS | TDB_K_SS)

/* The frame of a delivery; where it went is not known if it could not be placed. */
static struct tdb_frame writer_frame(const struct request *rq, const struct placement *p)
{
	if (p)
		return p->frame;
	return (struct tdb_frame){
		.entry = rq->event, .clobbered_by = NONE, .finding = NONE, .victim = NONE, .cpu = rq->cpu,
		.vector = rq->vector, .source = rq->source, .saved = rq->at, .gs = 2, .ring_gap = NONE, .overwritten_by = NONE,
	};
}

/* -- findings about the delivery itself ------------------------------------------------------------------------------- */

static void raise_fake(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	uint32_t which = rq->vector == VECTOR_MC, *fold;
	struct tdb_finding f;

	if (!rq->vector_known || rq->source == TDB_SRC_UNKNOWN || (rq->vector != VECTOR_NMI && rq->vector != VECTOR_MC))
		return;
	if (rq->source == (which ? TDB_SRC_MC : TDB_SRC_NMI) || (!which && rq->source == TDB_SRC_SYSCALL))
		return;
	fold = &c->fold.fake[which][rq->source];
	if (finding_folded(m, *fold))
		return;
	f = finding_new(which ? TDB_R_FAKE_MCE : TDB_R_FAKE_NMI, TDB_EV_RECORDED, rq->event, rq->cpu);
	f.writer = writer_frame(rq, p);
	*fold = finding_raise(m, &f);
}

static void raise_double_fault(struct machine *m, const struct cpu *c, const struct request *rq, const struct placement *p)
{
	struct tdb_finding f = finding_new(TDB_R_DOUBLE_FAULT, TDB_EV_RECORDED, rq->event, rq->cpu);

	f.cause_event = c->failed[0];
	f.cause_frame = c->failed[1];
	f.writer = writer_frame(rq, p);
	finding_raise(m, &f);
}

/* What did not come from an exception pushes no error code, and the handler takes one (R4). */
static void raise_no_code(struct machine *m, struct cpu *c, const struct placement *p)
{
	uint32_t *fold = &c->fold.code[code_vector(p->frame.vector)];
	struct tdb_finding f;

	if (finding_folded(m, *fold))
		return;
	f = finding_new(TDB_R_ERROR_CODE_MISMATCH, TDB_EV_INFERRED, p->frame.entry, p->frame.cpu);
	f.writer = p->frame;
	f.lo = p->frame.lo;
	f.hi = p->frame.hi;
	*fold = finding_raise(m, &f);
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
	bool gap = in_ring_gap(c, &rq->at);
	enum tdb_evidence ev = TDB_EV_UNKNOWN;
	struct tdb_finding f;

	if (p->switched)
		return;
	if (gap || in_user_memory(m->in, p->frame.lo, p->frame.hi))
		ev = TDB_EV_COMPUTED;
	else if (!m->in->user_count && c->s.known & TDB_CK_USER_RSP && !stack_named(p->key)) {
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
	if (gap && rq->vector == 1 && rq->source == TDB_SRC_EXCEPTION && c->ring_mov_ss != NONE) {  /* R32 */
		f.cause = TDB_CAUSE_MOV_SS;
		f.cause_event = c->ring_mov_ss;
		f.cause_frame = c->s.ring_gap;
	} else if (gap) {                                  /* R31 */
		f.cause = TDB_CAUSE_RING_GAP;
		f.cause_event = c->s.ring_gap;
	}
	finding_raise(m, &f);
}

/* -- state ------------------------------------------------------------------------------------------------------------- */

void nmi_block(struct cpu *c, uint32_t since)
{
	c->s.known |= TDB_CK_NMI;
	c->s.nmi_blocked = 1;
	c->s.nmi_pending = 0;
	c->s.nmi_since = since;
	c->s.nmi_unblocked_by = NONE;
	c->s.nmi_unblock_frame = NONE;
	c->stuck = false;
}

/* Masking that a delivery begins, wherever its frame went (R15, R16, R21). */
static void begin_masking(struct cpu *c, const struct request *rq)
{
	if (rq->source == TDB_SRC_NMI) {
		nmi_block(c, rq->event);
	} else if (rq->source == TDB_SRC_MC) {
		c->s.known |= TDB_CK_MCIP;
		c->s.mcip = 1;
	}
}

/* State at the handler's first instruction (R5, R6). */
static void enter_idt(const struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	c->s.cs = p->selector;
	c->s.known |= TDB_CK_CS;
	if (p->cpl_change || (p->frame.ist && m->in->fidelity & TDB_FID_SS_ZEROED)) {
		c->s.ss = 0;
		c->s.known |= TDB_CK_SS;
	} else if (!ctx_knows(&rq->at, TDB_K_CS)) {
		c->s.known &= ~TDB_CK_SS;
	}
	c->s.rflags &= ~(1u << 8 | 1u << 14 | RF);
	if (p->frame.gate_type == 0xe)
		c->s.rflags &= ~IF;
}

static void enter_fred(struct cpu *c, const struct placement *p)   /* R35 */
{
	if (p->cpl_change) {
		c->s.cs = (uint16_t)(c->msr[MSR_STAR] >> 32) & 0xfffc;
		c->s.ss = (uint16_t)(c->s.cs + 8);
		cpu_set_known(c, TDB_CK_CS | TDB_CK_SS, c->msr_known >> MSR_STAR & 1);
		c->s.gs = 1;
	}
	c->s.rflags = 2;
	c->s.known |= TDB_CK_RFLAGS | TDB_CK_CSL;
	c->s.csl = p->frame.level;
}

static void registers_entered(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	c->s.rsp = p->frame.lo;
	c->s.rip = p->handler;
	c->s.known |= TDB_CK_RSP | TDB_CK_RIP;
	if (p->frame.fred)
		enter_fred(c, p);
	else
		enter_idt(m, c, rq, p);
}

/* -- a delivery --------------------------------------------------------------------------------------------------------- */

/* Cut a placement to the words that were stored. */
static void cut(struct placement *p, uint64_t words)
{
	if (words < p->words.count) {
		p->words.count = (uint32_t)words;
		p->frame.lo = p->frame.hi - 8 * words;
		if (p->frame.has_code) {
			p->frame.has_code = 0;
			p->frame.saved.code = 0;
			p->frame.saved.known &= ~TDB_K_CODE;
		}
	}
}

static int apply_failed(struct machine *m, struct cpu *c, const struct request *rq, const struct tdb_event *e)
{
	struct nmi before = nmi_state(c);
	struct placement p;

	m->stats.failed++;
	c->failed[1] = c->failed[0];
	c->failed[0] = rq->event;
	begin_masking(c, rq);
	if (rq->source == TDB_SRC_NMI && !m->in->cfg.nmi_fail_blocks)   /* R20 leaves it open */
		c->s.known &= ~TDB_CK_NMI;
	if (!deliver_place(m, rq, &p))
		return TDB_OK;
	if (p.frame.ist && c->s.token_known & c->s.token_busy & 1u << p.frame.ist)
		raise_token(m, c, p.frame.ist, TDB_EV_COMPUTED, rq->event, rq->cpu, &p.frame);
	if (!(e->known & TDB_K_ADDR) || !e->addr)
		return TDB_OK;
	cut(&p, e->addr);
	verdict_overwrite(m, rq, &p, &before, true);
	return memory_store_down(&m->mem, p.frame.hi, &p.words, rq->event);
}

static int apply_placed(struct machine *m, struct cpu *c, const struct request *rq, struct placement *p)
{
	struct nmi before = nmi_state(c);
	int status;

	m->stats.judged++;
	m->stats.ist_deliveries[p->frame.ist & 7]++;
	if (!p->frame.fred && has_error_code(rq->vector) && rq->source != TDB_SRC_UNKNOWN && rq->source != TDB_SRC_EXCEPTION)
		raise_no_code(m, c, p);
	raise_user_stack(m, c, rq, p);
	if (unlikely(p->frame.lo < p->frame.stack_lo))
		overflow_delivery(m, c, rq, p);
	if (p->switched)
		verdict_overwrite(m, rq, p, &before, false);
	status = memory_store_down(&m->mem, p->frame.hi, &p->words, rq->event);
	if (!status)
		status = frame_open(m, &p->frame, p->key);
	if (status)
		return status;
	c->s.ring_gap = NONE;
	if (p->frame.ist)
		c->s.token_busy |= c->s.token_known & 1u << p->frame.ist;
	begin_masking(c, rq);
	registers_entered(m, c, rq, p);
	c->home = p->key;
	c->placed = rq->event;
	if (p->frame.ist)
		window_delivery(m, c, p);
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
		.data = e->value, .data_known = e->known & TDB_K_VALUE,
	};
	struct placement p;
	int status = TDB_OK;
	bool placed;

	if (e->flags & (TDB_F_LEGACY | TDB_F_SMM) || c->s.smm) {
		m->stats.legacy++;
		cpu_forget_registers(c);
		return TDB_OK;
	}
	if (in_guest(m, c)) {
		m->stats.deliveries++;
		m->stats.unjudged++;
		cpu_forget_registers(c);
		return TDB_OK;
	}
	cpu_set_registers(c, &rq.at);
	if (c->s.ring_gap != NONE && ctx_knows(&rq.at, TDB_K_RSP) && c->ring_rsp_known && rq.at.rsp != c->ring_rsp)
		c->s.ring_gap = NONE;
	if (e->flags & TDB_F_FAILED)
		return apply_failed(m, c, &rq, e);
	m->stats.deliveries++;
	observe(m, c, rq.cpu, &rq.at, index);
	placed = deliver_place(m, &rq, &p);
	raise_fake(m, c, &rq, placed ? &p : NULL);
	if (rq.source == TDB_SRC_FIXED && rq.vector_known && rq.vector < 16) {
		struct tdb_frame writer = writer_frame(&rq, placed ? &p : NULL);

		raise_illegal(m, c, rq.vector, index, rq.cpu, &writer);
	}
	if (rq.vector_known && rq.vector == VECTOR_DF && rq.source == TDB_SRC_EXCEPTION)
		raise_double_fault(m, c, &rq, placed ? &p : NULL);
	contradict(m, c, &rq, placed ? &p : NULL);
	c->failed[0] = c->failed[1] = NONE;
	c->token_reported = 0;
	if (placed) {
		status = apply_placed(m, c, &rq, &p);
	} else {
		m->stats.unjudged++;
		cpu_forget_registers(c);
		begin_masking(c, &rq);
	}
	c->depth++;
	return status;
}
