/* observe.c - what an interrupted context shows about open frames, where no return says it. */
#include "core.h"

/* What the closings of one observation have in common. */
struct seen {
	uint16_t cpu;
	uint32_t event;
	uint32_t first;                  /* the first of those entered since NMIs are blocked */
	struct tdb_frame since;          /* the one that blocked them; entry NONE: it was not closed */
};

static void seen_start(struct seen *seen, uint16_t cpu, uint32_t event)
{
	seen->cpu = cpu;
	seen->event = event;
	seen->first = NONE;
	seen->since.entry = NONE;        /* the rest of it only counts when it is set */
}

/* Close a frame that was seen to be done with; a clobbered one has survived. */
static void close_seen(struct machine *m, struct node *n, enum tdb_settle why, struct seen *seen)
{
	const struct cpu *c = &m->cpu[seen->cpu];

	if (n->f.cpu == seen->cpu && c->s.nmi_since != NONE) {
		/* Only what was entered since NMIs are blocked can have been left by the IRET that unblocked them. */
		if (n->f.entry < seen->first && n->f.entry >= c->s.nmi_since)
			seen->first = n->f.entry;
		if (n->f.entry == c->s.nmi_since)
			seen->since = n->f;
	}
	if (n->f.status == TDB_FRAME_CLOBBERED)
		finding_settle(m, n->f.finding, TDB_R_FRAME_RELOCATED, TDB_EV_INFERRED, seen->event, why);
	frame_close(m, n, why);
}

/* Only an IRET leaves a handler, and any IRET unblocks NMIs (R12): a frame that is done shows that one was executed. */
static void infer_unblock(struct machine *m, struct cpu *c, const struct seen *seen)
{
	if (seen->first == NONE || m->in->fidelity & TDB_FID_RETURNS)
		return;
	if (c->s.known & TDB_CK_NMI && c->s.nmi_blocked)
		nmi_unblock(c, seen->event, seen->first);
}

void raise_stuck(struct machine *m, struct cpu *c, uint16_t cpu, uint32_t event, enum tdb_evidence ev, const struct tdb_frame *f)
{
	struct tdb_finding finding;

	if (!(c->s.known & TDB_CK_NMI) || !c->s.nmi_blocked || c->stuck)
		return;
	c->stuck = true;
	finding = finding_new(TDB_R_NMI_STUCK, ev, event, cpu);
	finding.cause_event = c->s.nmi_since;
	if (f->entry != NONE) {
		finding.victim = *f;
		finding.lo = f->lo;
		finding.hi = f->hi;
	}
	finding_raise(m, &finding);
}

/* a: in an outer ring nothing lives on the CPU's own stacks. */
static void close_outer(struct machine *m, struct seen *seen)
{
	uint32_t next;

	for (uint32_t id = m->watch[seen->cpu].head; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->watch.next;
		if (n->f.status != TDB_FRAME_CLOBBERED)
			close_seen(m, n, TDB_SETTLE_CPL3, seen);
	}
}

void observe_outer(struct machine *m, uint16_t cpu, uint32_t event, bool unblocks, struct tdb_frame *since)
{
	struct seen seen;

	seen_start(&seen, cpu, event);
	close_outer(m, &seen);
	if (unblocks)                    /* a return speaks for itself, SYSRET unblocks nothing (R14) */
		infer_unblock(m, &m->cpu[cpu], &seen);
	if (since)
		*since = seen.since;
}

/* b: RSP stands above the frame on its own stack. */
static void close_popped(struct machine *m, uint64_t key, uint64_t rsp, uint32_t since, struct seen *seen)
{
	uint32_t next;

	for (uint32_t id = frames_on(&m->frames, key)->head; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->stack.next;
		if (stack_named(key) && n->f.cpu != seen->cpu)
			continue;
		if (n->f.status != TDB_FRAME_CLOBBERED && rsp > frame_rip_addr(&n->f) && n->f.entry >= since)
			close_seen(m, n, TDB_SETTLE_POPPED, seen);
	}
}

/* The entry of the frame whose handler must be the one that runs: the newest one above RSP on its stack.  An IST
 * reset puts RSP above frames that are not done; those are older.  0: there is none. */
static uint32_t running_since(const struct machine *m, uint16_t cpu, uint64_t key, uint64_t rsp)
{
	uint32_t since = 0;

	for (uint32_t id = frames_on(&m->frames, key)->head; id != NONE; id = m->frames.node[id].stack.next) {
		const struct tdb_frame *f = &m->frames.node[id].f;

		if (f->cpu == cpu && frame_rip_addr(f) >= rsp && f->entry > since)
			since = f->entry;
	}
	return since;
}

/* d: code that runs with IF = 1 elsewhere has left a handler whose gate cleared it, unless it runs inside of that one. */
static void close_unmasked(struct machine *m, uint64_t key, uint64_t rsp, struct seen *seen)
{
	uint32_t next;

	for (uint32_t id = m->watch[seen->cpu].head; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->watch.next;
		if (frame_dedicated(&n->f) && n->f.gate_type == 0xe && n->f.status != TDB_FRAME_CLOBBERED && n->key != key &&
		    !on_chain(m, seen->cpu, rsp, n->f.entry))
			close_seen(m, n, TDB_SETTLE_IF, seen);
	}
}

void observe(struct machine *m, struct cpu *c, uint16_t cpu, const struct tdb_context *at, uint32_t event)
{
	bool rsp_known = ctx_knows(at, TDB_K_RSP), rip_known = ctx_knows(at, TDB_K_RIP);
	bool if_set = ctx_knows(at, TDB_K_RFLAGS) && at->rflags & IF;
	bool outer = ctx_knows(at, TDB_K_CS) && at->cs & 3;
	bool returns = m->in->fidelity & TDB_FID_RETURNS;
	struct seen seen;
	uint32_t next, since = 0;
	uint64_t key = 0;

	seen_start(&seen, cpu, event);
	if (rsp_known) {
		key = stack_key(m->in, at->rsp);
		if (returns)
			since = running_since(m, cpu, key, at->rsp);   /* before anything is closed */
	}
	if (outer) {
		if (rsp_known && (at->cs & 3) == 3) {
			c->s.user_rsp = at->rsp;
			c->s.known |= TDB_CK_USER_RSP;
		}
		close_outer(m, &seen);
	}
	if (rsp_known)
		close_popped(m, key, at->rsp, since, &seen);
	for (uint32_t id = rsp_known ? m->watch[cpu].head : NONE; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->watch.next;
		if (!frame_dedicated(&n->f))
			continue;
		if (saved_knows(&n->f, TDB_K_RSP) && n->saved_key != n->key && n->f.entry >= since &&
		    !(returns && n->f.status == TDB_FRAME_CLOBBERED)) {
			if (rip_known && saved_knows(&n->f, TDB_K_RIP) && at->rip == n->f.saved.rip &&
			    at->rsp == n->f.saved.rsp) {
				close_seen(m, n, TDB_SETTLE_CONTEXT, &seen);
				continue;
			}
			if (key == n->saved_key && at->rsp >= n->f.saved.rsp) {
				close_seen(m, n, TDB_SETTLE_ABOVE, &seen);
				continue;
			}
		}
	}
	if (rsp_known && !returns && if_set)
		close_unmasked(m, key, at->rsp, &seen);
	if (unlikely(returns && (outer || seen.since.entry != NONE)))
		raise_stuck(m, c, cpu, event, TDB_EV_COMPUTED, &seen.since);
	infer_unblock(m, c, &seen);
}
