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

	f.victim.entry = f.victim.clobbered_by = f.victim.victim = f.victim.finding = f.victim.ring_gap =
		f.victim.overwritten_by = NONE;
	f.writer = f.victim;
	return f;
}

static struct tdb_finding *kept(struct machine *m, uint32_t number)
{
	return m->sink && number < m->sink->count ? &m->sink->item[number] : NULL;
}

/* A finding is as strong as the weakest fact under it: where events are inferred, no stronger than they. */
static uint8_t weakest(const struct machine *m, uint8_t ev)
{
	return m->in->fidelity & TDB_FID_INFERRED && ev > TDB_EV_INFERRED ? TDB_EV_INFERRED : ev;
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
	sink->item[sink->count] = *f;
	sink->item[sink->count++].evidence = weakest(m, f->evidence);
	return number;
}

void finding_settle(struct machine *m, uint32_t number, enum tdb_rule rule, enum tdb_evidence ev, uint32_t event,
		    enum tdb_settle by)
{
	struct tdb_finding *f = kept(m, number);

	if (!f)
		return;
	f->rule = rule;
	f->settled_evidence = weakest(m, (uint8_t)ev);
	f->settled = event;
	f->settled_by = by;
}

void finding_lost(struct machine *m, uint32_t number, uint32_t event)
{
	struct tdb_finding *f = kept(m, number);

	if (f)
		finding_settle(m, number, f->rule, TDB_EV_UNKNOWN, event, TDB_SETTLE_DROPPED);
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

bool finding_folded(struct machine *m, uint32_t number)
{
	if (number == NONE)
		return false;
	finding_count_again(m, number);
	return true;
}

void finding_count_again(struct machine *m, uint32_t number)
{
	struct tdb_finding *f = kept(m, number);

	if (f && f->count < UINT32_MAX)
		f->count++;
}

/* -- overwrites ------------------------------------------------------------------------------------------------------ */

void compare_words(const struct machine *m, const struct tdb_frame *victim, uint64_t hi, const struct words *words,
		   uint8_t *slots, uint8_t *differ)
{
	*slots = *differ = 0;
	for (uint32_t i = 0; i < words->count; i++) {
		uint64_t addr = hi - 8 * (i + 1), was;
		int64_t slot = (int64_t)(addr - frame_rip_addr(victim)) >> 3;
		uint8_t known;
		uint32_t by;

		if (slot < (victim->has_code ? -1 : 0) || slot > 4)
			continue;
		slot = slot < 0 ? 5 : slot;
		*slots |= (uint8_t)(1u << slot);
		memory_load(&m->mem, addr, &was, &known, &by);
		if (known != 0xff || words->known[i] != 0xff || was != words->value[i])
			*differ |= (uint8_t)(1u << slot);
	}
}

static void find_cause(const struct request *rq, const struct tdb_frame *victim, const struct nmi *before,
		       struct tdb_finding *f)
{
	if (victim->cpu != rq->cpu) {
		f->cause = TDB_CAUSE_OTHER_CPU;
		return;
	}
	switch (rq->source) {
	case TDB_SRC_NMI:
		if (before->known && before->blocked) {
			f->cause = TDB_CAUSE_NMI_UNKNOWN;
		} else if (!before->known && victim->source == TDB_SRC_UNKNOWN) {
			f->cause = TDB_CAUSE_NMI_UNKNOWN;
		} else if (before->since != NONE && before->unblocked_by != NONE && before->unblocked_by > victim->entry) {
			f->cause = TDB_CAUSE_NMI_UNBLOCKED;
			f->cause_event = before->unblocked_by;
			f->cause_frame = before->unblock_frame;
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

static void overwrite_one(struct machine *m, const struct request *rq, struct placement *p, const struct nmi *before,
			  struct node *n, bool computed)
{
	struct tdb_finding f = finding_new(TDB_R_FRAME_CLOBBERED, computed ? TDB_EV_COMPUTED : TDB_EV_INFERRED, rq->event,
					   rq->cpu);

	compare_words(m, &n->f, p->frame.hi, &p->words, &f.slots, &f.differ);
	f.lo = n->f.lo > p->frame.lo ? n->f.lo : p->frame.lo;
	f.hi = n->f.hi < p->frame.hi ? n->f.hi : p->frame.hi;
	f.victim = n->f;
	f.writer = p->frame;
	find_cause(rq, &n->f, before, &f);
	frame_overwritten(&n->f, rq->event);
	if (n->f.status == TDB_FRAME_MOVED) {
		f.rule = f.raised_rule = TDB_R_FRAME_RELOCATED;
		f.evidence = TDB_EV_RECORDED;
		n->f.finding = finding_raise(m, &f);
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
static bool nmi_had_returned(const struct machine *m, const struct request *rq, const struct nmi *before, const struct node *n)
{
	return !(m->in->fidelity & TDB_FID_RETURNS) && rq->source == TDB_SRC_NMI && before->known && before->blocked &&
	       n->f.status == TDB_FRAME_LIVE && n->f.cpu == rq->cpu && n->f.entry == before->since && n->mark != rq->event;
}

void verdict_overwrite(struct machine *m, const struct request *rq, struct placement *p, const struct nmi *before, bool failed)
{
	struct list *list = frames_on(&m->frames, p->key);
	bool returns = m->in->fidelity & TDB_FID_RETURNS, marked = false;
	uint32_t prev;

	if (failed && !frame_dedicated(&p->frame))
		return;
	for (uint32_t id = list->tail; id != NONE; id = prev) {
		struct node *n = frame_at(m, id);

		prev = n->stack.prev;
		if (n->f.lo >= p->frame.hi || n->f.hi <= p->frame.lo)
			continue;
		if (!frame_dedicated(&p->frame)) {         /* taken from outer rings: what lay there is dead */
			if (n->f.status != TDB_FRAME_CLOBBERED && (!stack_named(p->key) || n->f.cpu == rq->cpu))
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
