/* contradict.c - model-mismatch: what a delivery itself says against the rules of the architecture. */
#include "core.h"

static void raise_mismatch(struct machine *m, struct cpu *c, const struct request *rq, enum tdb_mismatch kind)
{
	uint32_t *fold = &c->fold.mismatch[__builtin_ctz(kind)];
	struct tdb_finding f;

	if (finding_folded(m, *fold))
		return;
	f = finding_new(TDB_R_MODEL_MISMATCH, TDB_EV_COMPUTED, rq->event, rq->cpu);
	f.detail = (uint16_t)kind;
	*fold = finding_raise(m, &f);
}

/* R7, R8: a gate that cannot deliver this. */
static bool gate_refuses(const struct machine *m, const struct request *rq)
{
	const struct tdb_gate *gate = m->cpu[rq->cpu].s.fred ? NULL : deliver_gate(m, rq);
	bool int1 = rq->vector == 1 && (!ctx_knows(&rq->at, TDB_K_CODE) || rq->at.code == 1);
	uint64_t base;

	if (!gate)
		return false;
	if (!(gate->flags & TDB_GATE_PRESENT) || (gate->type != 0xe && gate->type != 0xf))
		return true;
	if (rq->source == TDB_SRC_SOFT_INT && !int1 && ctx_knows(&rq->at, TDB_K_CS) && (rq->at.cs & 3) > gate->dpl)
		return true;
	return deliver_base(m, rq, gate, &base) && !is_canonical(base);
}

static bool contributory(uint8_t vector) { return vector == 0 || (vector >= 10 && vector <= 13) || vector == 21; }
static bool page_fault(uint8_t vector) { return vector == 14 || vector == 20; }

static bool makes_double_fault(uint8_t first, uint8_t second)   /* R20 */
{
	return (contributory(first) && contributory(second)) || (page_fault(first) && (contributory(second) || page_fault(second)));
}

/* The vector of a failed delivery, if it was an exception's. */
static bool failed_exception(const struct machine *m, uint32_t index, uint8_t *vector)
{
	const struct tdb_event *e = index == NONE ? NULL : &m->in->events[index];

	if (!e || !(e->known & TDB_K_ARG) || !(e->known & TDB_K_SOURCE) || e->source != TDB_SRC_EXCEPTION)
		return false;
	*vector = e->arg;
	return true;
}

/* Delivered again, after a VM exit that had nothing to do with it: nothing in the record is different. */
static bool again(const struct machine *m, uint32_t index, const struct request *rq)
{
	const uint32_t at = TDB_K_RIP | TDB_K_CODE;
	const struct tdb_event *e = &m->in->events[index];

	if (e->arg != rq->vector || (e->known & at) != (rq->at.known & at) || !(e->known & TDB_K_VALUE) != !rq->data_known)
		return false;
	return (!(e->known & TDB_K_RIP) || e->rip == rq->at.rip) && (!(e->known & TDB_K_CODE) || e->code == rq->at.code) &&
	       (!rq->data_known || e->value == rq->data);
}

static bool against_table(const struct machine *m, const struct cpu *c, const struct request *rq)
{
	uint8_t first;

	if (rq->source != TDB_SRC_EXCEPTION || !rq->vector_known || !failed_exception(m, c->failed[0], &first))
		return false;
	if (rq->vector != VECTOR_DF)
		return makes_double_fault(first, rq->vector) && !again(m, c->failed[0], rq);
	return !contributory(first) && !page_fault(first);   /* the fault that became the #DF need not be recorded */
}

void contradict(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	bool maskable = is_maskable(rq->source);

	if (maskable && ctx_knows(&rq->at, TDB_K_RFLAGS) && !(rq->at.rflags & IF))
		raise_mismatch(m, c, rq, TDB_MM_IF_CLEAR);
	if (rq->source == TDB_SRC_NMI && m->in->fidelity & TDB_FID_RETURNS && c->s.known & TDB_CK_NMI && c->s.nmi_blocked)
		raise_mismatch(m, c, rq, TDB_MM_NMI_BLOCKED);
	if (gate_refuses(m, rq))
		raise_mismatch(m, c, rq, TDB_MM_GATE);
	if (rq->source == TDB_SRC_MC && ((c->mcip_told && c->s.known & TDB_CK_MCIP && c->s.mcip) || (c->s.known & TDB_CK_MCE && !c->s.mce)))
		raise_mismatch(m, c, rq, TDB_MM_MC_SHUTDOWN);
	if (rq->source == TDB_SRC_FIXED && rq->vector_known && rq->vector >= 16 && c->s.known & TDB_CK_TPR &&
	    rq->vector >> 4 <= c->s.tpr >> 4)
		raise_mismatch(m, c, rq, TDB_MM_TPR);
	if (unlikely(c->failed[0] != NONE) && against_table(m, c, rq))
		raise_mismatch(m, c, rq, TDB_MM_DOUBLE_FAULT);
	if ((maskable || rq->source == TDB_SRC_NMI) && c->s.known & TDB_CK_GIF && !c->s.gif)
		raise_mismatch(m, c, rq, TDB_MM_GIF);
	if (p && p->frame.ist && c->s.token_known & c->s.token_busy & 1u << p->frame.ist)
		raise_mismatch(m, c, rq, TDB_MM_TOKEN);
}
