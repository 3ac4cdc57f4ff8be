/* verdict.c - findings: what a delivery overwrote, why it could, and how that is settled later. */
#include <stdlib.h>

#include "core.h"

struct tdb_finding finding_new(enum tdb_rule rule, enum tdb_evidence ev, uint32_t event, uint16_t cpu)
{
	struct tdb_finding f = {
		.rule = rule, .raised_rule = rule, .evidence = ev, .settled_evidence = TDB_EV_UNKNOWN, .event = event,
		.settled = NONE, .consumer = NONE, .cause_event = NONE, .cause_frame = NONE, .count = 1, .cpu = cpu,
		.settled_by = TDB_SETTLE_COUNT,
	};

	f.victim.entry = f.victim.clobbered_by = f.victim.victim = f.victim.finding = NONE;
	f.writer = f.victim;
	return f;
}

static struct tdb_finding *kept(struct machine *m, uint32_t number)
{
	return m->sink && number < m->sink->count ? &m->sink->item[number] : NULL;
}

uint32_t finding_raise(struct machine *m, const struct tdb_finding *f)
{
	uint32_t number = m->finding_count;
	struct findings *sink = m->sink;

	if (m->finding_count < NONE - 1)
		m->finding_count++;
	if (!sink || number != sink->count || number >= sink->limit)
		return number;
	if (sink->count == sink->capacity) {
		uint32_t capacity = sink->capacity ? sink->capacity * 2 : 16;
		struct tdb_finding *item = realloc(sink->item, capacity * sizeof(*item));

		if (!item) {
			sink->status = TDB_E_NOMEM;
			return number;
		}
		sink->item = item;
		sink->capacity = capacity;
	}
	sink->item[sink->count++] = *f;
	return number;
}

void finding_settle(struct machine *m, uint32_t number, enum tdb_rule rule, enum tdb_evidence ev, uint32_t event,
		    enum tdb_settle by)
{
	struct tdb_finding *f = kept(m, number);

	if (!f)
		return;
	f->rule = rule;
	f->settled_evidence = ev;
	f->settled = event;
	f->settled_by = by;
}

void finding_consumed(struct machine *m, uint32_t number, uint32_t event, const struct tdb_context *popped)
{
	struct tdb_finding *f = kept(m, number);

	if (!f)
		return;
	finding_settle(m, number, TDB_R_FRAME_CONSUMED_CORRUPT, TDB_EV_RECORDED, event, TDB_SETTLE_RETURN);
	f->consumer = event;
	f->popped = *popped;
}

void finding_count_again(struct machine *m, uint32_t number)
{
	struct tdb_finding *f = kept(m, number);

	if (f && f->count < UINT32_MAX)
		f->count++;
}

/* -- the chain of frames that must be live because each one's context leads to the next ------------------------------ */

static struct node *nearest_above(const struct machine *m, uint16_t cpu, uint64_t cur)
{
	uint64_t key = stack_key(m->in, cur);
	struct node *best = NULL;

	for (uint32_t id = frames_on(&m->frames, key)->head; id != NONE; id = m->frames.node[id].stack.next) {
		struct node *n = frame_at(m, id);

		if (stack_named(key) && n->f.cpu != cpu)
			continue;
		if (frame_rip_addr(&n->f) < cur)
			continue;
		if (!best || frame_rip_addr(&n->f) < frame_rip_addr(&best->f))
			best = n;
	}
	return best;
}

/* After an IST reset the newest frame's saved RSP lies in its own stack: what it interrupted goes on at its victim. */
static struct node *past_resets(struct machine *m, struct node *n, uint32_t mark)
{
	while (saved_knows(&n->f, TDB_K_RSP) && n->saved_key == n->key && n->f.saved.rsp <= frame_rip_addr(&n->f) &&
	       n->f.victim != NONE) {
		struct node *victim = frame_of_entry(m, n->key, n->f.victim);

		if (!victim || victim->mark == mark)
			return NULL;
		victim->mark = mark;
		n = victim;
	}
	return n;
}

/* Mark the frames on the chain of a CPU whose RSP is `cur` with the number of the delivery. */
static void mark_chain(struct machine *m, uint16_t cpu, uint64_t cur, uint32_t mark)
{
	for (int i = 0; i < CHAIN_LIMIT; i++) {
		struct node *n = nearest_above(m, cpu, cur);

		if (!n || n->mark == mark)
			return;
		n->mark = mark;
		n = past_resets(m, n, mark);
		if (!n || !saved_knows(&n->f, TDB_K_CS | TDB_K_RSP) || n->f.saved.cs & 3)
			return;
		cur = n->f.saved.rsp;
	}
}

/* -- overwrites ------------------------------------------------------------------------------------------------------ */

struct word { uint64_t value; bool known; };

static void frame_words(const struct tdb_frame *f, struct word ret[6])
{
	const struct tdb_context *s = &f->saved;

	ret[0] = (struct word){ s->rip, s->known & TDB_K_RIP };
	ret[1] = (struct word){ s->cs, s->known & TDB_K_CS };
	ret[2] = (struct word){ s->rflags, s->known & TDB_K_RFLAGS };
	ret[3] = (struct word){ s->rsp, s->known & TDB_K_RSP };
	ret[4] = (struct word){ s->ss, s->known & TDB_K_SS };
	ret[5] = (struct word){ s->code, s->known & TDB_K_CODE };
}

static uint64_t slot_addr(const struct tdb_frame *f, int slot)
{
	return slot == 5 ? f->hi - 48 : f->hi - 40 + 8 * (uint64_t)slot;
}

/* Slots of the victim that the writer's frame covers, and those of them whose memory does not keep its value. */
static void compare_frames(const struct machine *m, const struct tdb_frame *victim, const struct tdb_frame *writer,
			   uint8_t *slots, uint8_t *differ)
{
	struct word now[6];

	frame_words(writer, now);
	*slots = *differ = 0;
	for (int i = 0; i < (victim->has_code ? 6 : 5); i++) {
		for (int j = 0; j < (writer->has_code ? 6 : 5); j++) {
			uint64_t was;
			uint8_t known;
			uint32_t by;

			if (slot_addr(victim, i) != slot_addr(writer, j))
				continue;
			*slots |= 1u << i;
			memory_load(&m->mem, slot_addr(victim, i), &was, &known, &by);
			if (known != 0xff || !now[j].known || was != now[j].value)
				*differ |= 1u << i;
		}
	}
}

static void find_cause(const struct request *rq, const struct tdb_frame *victim, const struct tdb_cpu *before,
		       struct tdb_finding *f)
{
	if (victim->cpu != rq->cpu) {
		f->cause = TDB_CAUSE_OTHER_CPU;
		return;
	}
	switch (rq->source) {
	case TDB_SRC_NMI:
		if (before->known & TDB_CK_NMI && before->nmi_blocked) {
			f->cause = TDB_CAUSE_NMI_UNKNOWN;
		} else if (!(before->known & TDB_CK_NMI) && victim->source == TDB_SRC_UNKNOWN) {
			f->cause = TDB_CAUSE_NMI_UNKNOWN;
		} else if (before->nmi_since != NONE && before->nmi_unblocked_by != NONE &&
			   before->nmi_unblocked_by > victim->entry) {
			f->cause = TDB_CAUSE_NMI_UNBLOCKED;
			f->cause_event = before->nmi_unblocked_by;
			f->cause_frame = before->nmi_unblock_frame;
		} else {
			f->cause = TDB_CAUSE_NMI_NEVER_BLOCKED;
		}
		break;
	case TDB_SRC_MC:
		f->cause = TDB_CAUSE_MC_UNMASKED;
		break;
	case TDB_SRC_FIXED:
	case TDB_SRC_EXTINT:
	case TDB_SRC_EXTERNAL:
	case TDB_SRC_INJECTED:
		f->cause = TDB_CAUSE_MASKABLE;
		break;
	case TDB_SRC_UNKNOWN:
		f->cause = TDB_CAUSE_NONE;
		break;
	default:
		f->cause = TDB_CAUSE_SOFTWARE;
		break;
	}
}

static void overwrite_one(struct machine *m, const struct request *rq, struct placement *p, const struct tdb_cpu *before,
			  struct node *n, bool computed)
{
	struct tdb_finding f = finding_new(TDB_R_FRAME_CLOBBERED, computed ? TDB_EV_COMPUTED : TDB_EV_INFERRED, rq->event,
					   rq->cpu);

	compare_frames(m, &n->f, &p->frame, &f.slots, &f.differ);
	f.lo = n->f.lo > p->frame.lo ? n->f.lo : p->frame.lo;
	f.hi = n->f.hi < p->frame.hi ? n->f.hi : p->frame.hi;
	f.victim = n->f;
	f.writer = p->frame;
	find_cause(rq, &n->f, before, &f);
	n->f.clobbered_by = rq->event;
	if (n->f.status == TDB_FRAME_MOVED) {
		f.rule = f.raised_rule = TDB_R_FRAME_RELOCATED;
		f.evidence = TDB_EV_RECORDED;
		finding_raise(m, &f);
		frame_close(m, n, TDB_SETTLE_OVERWRITTEN);
	} else if (!f.differ) {
		f.rule = f.raised_rule = TDB_R_FRAME_SAME_BYTES;
		if (n->f.finding == NONE)
			n->f.finding = finding_raise(m, &f);
		else
			finding_count_again(m, n->f.finding);
	} else {
		n->f.finding = finding_raise(m, &f);
		n->f.status = TDB_FRAME_CLOBBERED;
		p->frame.victim = n->f.entry;
	}
}

/* Without returns: the NMI that blocked NMIs is off the chain, and a genuine NMI came.  Its IRET is what let it come. */
static bool nmi_had_returned(const struct machine *m, const struct request *rq, const struct tdb_cpu *before,
			     const struct node *n)
{
	return !(m->in->fidelity & TDB_FID_RETURNS) && rq->source == TDB_SRC_NMI && before->known & TDB_CK_NMI &&
	       before->nmi_blocked && n->f.status == TDB_FRAME_LIVE && n->f.cpu == rq->cpu &&
	       n->f.entry == before->nmi_since && n->mark != rq->event;
}

void verdict_overwrite(struct machine *m, const struct request *rq, struct placement *p, const struct tdb_cpu *before)
{
	uint64_t key = stack_key(m->in, p->frame.hi);
	struct list *list = frames_on(&m->frames, key);
	bool returns = m->in->fidelity & TDB_FID_RETURNS, marked = false;
	uint32_t prev;

	for (uint32_t id = list->tail; id != NONE; id = prev) {
		struct node *n = frame_at(m, id);

		prev = n->stack.prev;
		if (n->f.lo >= p->frame.hi || n->f.hi <= p->frame.lo)
			continue;
		if (!p->gate.ist) {                        /* RSP0 is taken from outer rings: what lay there is dead */
			if (n->f.status != TDB_FRAME_CLOBBERED && (!stack_named(key) || n->f.cpu == rq->cpu))
				frame_close(m, n, TDB_SETTLE_CPL3);
			continue;
		}
		if (n->f.status == TDB_FRAME_CLOBBERED) {
			n->f.clobbered_by = rq->event;
			continue;
		}
		if (!marked && ctx_knows(&rq->at, TDB_K_RSP)) {
			mark_chain(m, rq->cpu, rq->at.rsp, rq->event);
			marked = true;
		}
		if (nmi_had_returned(m, rq, before, n)) {
			frame_close(m, n, TDB_SETTLE_NMI);
			continue;
		}
		overwrite_one(m, rq, p, before, n, returns || n->mark == rq->event);
	}
}
