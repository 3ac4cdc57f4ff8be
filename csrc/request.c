/* request.c - requests that were made (NMI latch, local APIC), and the tokens of the shadow stacks. */
#include "core.h"

void raise_illegal(struct machine *m, struct cpu *c, uint8_t vector, uint32_t index, uint16_t cpu, const struct tdb_frame *writer)
{
	struct tdb_finding f;

	if (finding_folded(m, c->fold.illegal[vector]))
		return;
	f = finding_new(TDB_R_ILLEGAL_VECTOR, TDB_EV_RECORDED, index, cpu);
	f.detail = vector;
	if (writer)
		f.writer = *writer;
	c->fold.illegal[vector] = finding_raise(m, &f);
}

static void raise_held(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	struct tdb_finding f;

	if (finding_folded(m, c->fold.held[e->arg - 16]))
		return;
	f = finding_new(TDB_R_HELD_VECTOR, TDB_EV_RECORDED, index, e->cpu);
	f.detail = e->arg;
	c->fold.held[e->arg - 16] = finding_raise(m, &f);
}

static void nmi_raised(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)   /* R16 */
{
	struct tdb_finding f;

	if (!(c->s.known & TDB_CK_NMI) || !c->s.nmi_blocked)
		return;
	if (c->s.nmi_pending && !finding_folded(m, c->fold.nmi_lost)) {
		f = finding_new(TDB_R_NMI_LOST, TDB_EV_RECORDED, index, e->cpu);
		f.cause_event = c->s.nmi_since;
		c->fold.nmi_lost = finding_raise(m, &f);
	}
	c->s.nmi_pending = 1;
}

void request_raised(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	if (!(e->known & TDB_K_ARG) || !(e->known & TDB_K_SOURCE))
		return;
	if (e->source == TDB_SRC_NMI && e->arg == VECTOR_NMI)
		nmi_raised(m, c, e, index);
	else if (e->source == TDB_SRC_FIXED && e->arg < 16)                /* R25 */
		raise_illegal(m, c, e->arg, index, e->cpu, NULL);
	else if (e->source == TDB_SRC_FIXED && e->arg < 32 && c->s.known & TDB_CK_TPR && e->arg >> 4 <= c->s.tpr >> 4)  /* R26 */
		raise_held(m, c, e, index);
}

/* -- shadow-stack tokens (R34) ----------------------------------------------------------------------------------------- */

static const struct tdb_frame *newest_of_ist(const struct machine *m, uint16_t cpu, uint8_t ist)
{
	for (uint32_t id = m->watch[cpu].head; id != NONE; id = m->frames.node[id].watch.next)
		if (m->frames.node[id].f.ist == ist)
			return &m->frames.node[id].f;
	return NULL;
}

void raise_token(struct machine *m, struct cpu *c, uint8_t ist, enum tdb_evidence ev, uint32_t index, uint16_t cpu,
		 const struct tdb_frame *writer)
{
	const struct tdb_frame *victim = newest_of_ist(m, cpu, ist);
	struct tdb_finding f;

	if (c->token_reported >> ist & 1)
		return;
	c->token_reported |= (uint8_t)(1u << ist);
	f = finding_new(TDB_R_TOKEN_BUSY, ev, index, cpu);
	f.detail = ist;
	if (writer)
		f.writer = *writer;
	if (victim) {
		f.victim = *victim;
		f.lo = victim->lo;
		f.hi = victim->hi;
	}
	finding_raise(m, &f);
}

void token_event(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	uint8_t bit;

	if (!(e->known & TDB_K_ARG) || e->arg < 1 || e->arg > 7 || !(e->known & TDB_K_VALUE))
		return;
	bit = (uint8_t)(1u << e->arg);
	c->s.token_known |= bit;
	c->s.token_busy = (uint8_t)(e->value & 1 ? c->s.token_busy | bit : c->s.token_busy & ~bit);
	if (e->known & TDB_K_CODE && e->code & 1 && e->value & 1)
		raise_token(m, c, e->arg, TDB_EV_RECORDED, index, e->cpu, NULL);
}
