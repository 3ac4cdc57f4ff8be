/* observe.c - what an interrupted context shows about open frames, where no return says it. */
#include "core.h"

/* Close a frame that was seen to be done with; a clobbered one has survived. */
static void close_seen(struct machine *m, struct node *n, enum tdb_settle why, uint16_t cpu, uint32_t event, uint32_t *first)
{
	struct cpu *c = &m->cpu[cpu];

	/* Only what was entered since NMIs are blocked can have been left by the IRET that unblocked them. */
	if (n->f.cpu == cpu && n->f.entry < *first && c->s.nmi_since != NONE && n->f.entry >= c->s.nmi_since)
		*first = n->f.entry;
	if (n->f.status == TDB_FRAME_CLOBBERED)
		finding_settle(m, n->f.finding, TDB_R_FRAME_RELOCATED, TDB_EV_INFERRED, event, why);
	frame_close(m, n, why);
}

/* Only an IRET leaves a handler, and any IRET unblocks NMIs (R12): a frame that is done shows that one was executed. */
static void infer_unblock(struct machine *m, struct cpu *c, uint32_t event, uint32_t first)
{
	if (first == NONE || m->in->fidelity & TDB_FID_RETURNS)
		return;
	if (c->s.known & TDB_CK_NMI && c->s.nmi_blocked)
		nmi_unblock(c, event, first);
}

/* a: in an outer ring nothing lives on the CPU's own stacks. */
static void close_outer(struct machine *m, uint16_t cpu, uint32_t event, uint32_t *first)
{
	uint32_t next;

	for (uint32_t id = m->watch[cpu].head; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->watch.next;
		if (n->f.status != TDB_FRAME_CLOBBERED)
			close_seen(m, n, TDB_SETTLE_CPL3, cpu, event, first);
	}
}

void observe_outer(struct machine *m, uint16_t cpu, uint32_t event)
{
	uint32_t ignored = NONE;             /* the return has unblocked NMIs itself, SYSRET does not (R14) */

	close_outer(m, cpu, event, &ignored);
}

/* b: RSP stands above the frame on its own stack. */
static void close_popped(struct machine *m, uint16_t cpu, uint64_t key, uint64_t rsp, uint32_t event, uint32_t *first)
{
	uint32_t next;

	for (uint32_t id = frames_on(&m->frames, key)->head; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->stack.next;
		if (stack_named(key) && n->f.cpu != cpu)
			continue;
		if (n->f.status != TDB_FRAME_CLOBBERED && rsp > frame_rip_addr(&n->f))
			close_seen(m, n, TDB_SETTLE_POPPED, cpu, event, first);
	}
}

void observe(struct machine *m, struct cpu *c, uint16_t cpu, const struct tdb_context *at, uint32_t event)
{
	bool rsp_known = ctx_knows(at, TDB_K_RSP), rip_known = ctx_knows(at, TDB_K_RIP);
	bool if_set = ctx_knows(at, TDB_K_RFLAGS) && at->rflags & 1u << 9;
	bool returns = m->in->fidelity & TDB_FID_RETURNS;
	uint32_t first = NONE, next;
	uint64_t key = 0;

	if (ctx_knows(at, TDB_K_CS) && at->cs & 3) {
		if (rsp_known && (at->cs & 3) == 3) {
			c->s.user_rsp = at->rsp;
			c->s.known |= TDB_CK_USER_RSP;
		}
		close_outer(m, cpu, event, &first);
	}
	if (rsp_known) {
		key = stack_key(m->in, at->rsp);
		close_popped(m, cpu, key, at->rsp, event, &first);
	}
	for (uint32_t id = rsp_known ? m->watch[cpu].head : NONE; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->watch.next;
		if (!n->f.ist)
			continue;
		if (saved_knows(&n->f, TDB_K_RSP) && n->saved_key != n->key) {
			if (rip_known && saved_knows(&n->f, TDB_K_RIP) && at->rip == n->f.saved.rip &&
			    at->rsp == n->f.saved.rsp) {
				close_seen(m, n, TDB_SETTLE_CONTEXT, cpu, event, &first);
				continue;
			}
			if (key == n->saved_key && at->rsp >= n->f.saved.rsp) {
				close_seen(m, n, TDB_SETTLE_ABOVE, cpu, event, &first);
				continue;
			}
		}
		if (!returns && if_set && n->f.gate_type == 0xe && n->f.status != TDB_FRAME_CLOBBERED && key != n->key)
			close_seen(m, n, TDB_SETTLE_IF, cpu, event, &first);
	}
	infer_unblock(m, c, event, first);
}
