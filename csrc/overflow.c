/* overflow.c - stacks that are left through the bottom, and what lies in the stack below them. */
#include "core.h"

static void raise_overflow(struct machine *m, struct cpu *c, uint64_t key, struct tdb_finding *f)
{
	if (c->fold.overflow != NONE && c->fold.overflow_key == key) {
		finding_count_again(m, c->fold.overflow);
		return;
	}
	c->fold.overflow_key = key;
	c->fold.overflow = finding_raise(m, f);
}

/* The frame begins below the stack that it lies on. */
void overflow_delivery(struct machine *m, struct cpu *c, const struct request *rq, const struct placement *p)
{
	uint64_t key = p->key, bottom = p->frame.stack_lo;
	uint64_t below = stack_key(m->in, bottom);
	bool told = stack_named(key) && !(m->in->stack[key].flags & TDB_STACK_ASSUMED);
	bool returns = m->in->fidelity & TDB_FID_RETURNS;
	struct tdb_finding f;
	uint32_t prev;

	if (told) {
		f = finding_new(TDB_R_STACK_OVERFLOW, TDB_EV_COMPUTED, p->frame.entry, p->frame.cpu);
		f.writer = p->frame;
		f.lo = p->frame.lo;
		f.hi = bottom;
		raise_overflow(m, c, key, &f);
	}
	/* Where nothing tells that a stack ends here, what lies below was popped from the same one. */
	if (!frame_dedicated(&p->frame) && !told && !(stack_named(key) && stack_named(below)))
		return;
	if (ctx_knows(&rq->at, TDB_K_RSP))
		mark_chain(m, rq->cpu, rq->at.rsp, rq->event);
	for (uint32_t id = frames_on(&m->frames, below)->tail; id != NONE; id = prev) {
		struct node *n = frame_at(m, id);

		prev = n->stack.prev;
		if (n->f.lo >= bottom || n->f.hi <= p->frame.lo)
			continue;
		if (n->f.status == TDB_FRAME_CLOBBERED) {
			n->f.clobbered_by = p->frame.entry;
			continue;
		}
		f = finding_new(TDB_R_NEIGHBOUR_OVERWRITE, returns || n->mark == rq->event ? TDB_EV_COMPUTED : TDB_EV_INFERRED,
				p->frame.entry, p->frame.cpu);
		compare_words(m, &n->f, p->frame.hi, &p->words, &f.slots, &f.differ);
		if (!f.differ)
			continue;
		f.lo = n->f.lo > p->frame.lo ? n->f.lo : p->frame.lo;
		f.hi = n->f.hi < p->frame.hi ? n->f.hi : p->frame.hi;
		f.victim = n->f;
		f.writer = p->frame;
		frame_overwritten(&n->f, p->frame.entry);
		n->f.status = TDB_FRAME_CLOBBERED;
		n->f.finding = finding_raise(m, &f);
	}
}

/* Slots of a frame that a store covers, and those of them with a byte that is not known to keep its value. */
static void compare_store(const struct machine *m, const struct tdb_frame *v, uint64_t addr, const uint8_t *bytes, uint32_t length,
			  uint8_t *slots, uint8_t *differ)
{
	for (int i = 0; i < (v->has_code ? 6 : 5); i++) {
		uint64_t at = slot_addr(v, i), was;
		uint8_t known;
		uint32_t by;

		memory_load(&m->mem, at, &was, &known, &by);
		for (int b = 0; b < 8; b++) {
			uint64_t offset = at + b - addr;

			if (at + b < addr || offset >= length)
				continue;
			*slots |= (uint8_t)(1u << i);
			if (!bytes || !(known >> b & 1) || (uint8_t)(was >> 8 * b) != bytes[offset])
				*differ |= (uint8_t)(1u << i);
		}
	}
}

static void neighbours(struct machine *m, const struct tdb_event *e, uint32_t index, uint64_t key, bool push,
		       const uint8_t *bytes, uint32_t length)
{
	uint64_t last = e->addr + (length - 1) < e->addr ? UINT64_MAX : e->addr + (length - 1);
	uint32_t prev;

	for (uint32_t id = m->frames.named[key].tail; id != NONE; id = prev) {
		struct tdb_finding f = finding_new(TDB_R_NEIGHBOUR_OVERWRITE, push ? TDB_EV_RECORDED : TDB_EV_INFERRED, index, e->cpu);
		struct node *n = frame_at(m, id);

		prev = n->stack.prev;
		if (n->f.status == TDB_FRAME_CLOBBERED || n->f.hazards >> TDB_HAZARD_NEIGHBOUR & 1 || n->f.lo > last || n->f.hi <= e->addr)
			continue;
		compare_store(m, &n->f, e->addr, bytes, length, &f.slots, &f.differ);
		if (!f.differ)
			continue;
		f.lo = n->f.lo > e->addr ? n->f.lo : e->addr;
		f.hi = n->f.hi <= last ? n->f.hi : last + 1;
		f.victim = n->f;
		n->f.hazards |= 1u << TDB_HAZARD_NEIGHBOUR;
		finding_raise(m, &f);
	}
}

void overflow_write(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index, const uint8_t *bytes,
		    uint32_t length)
{
	const struct tdb_stack *home = &m->in->stack[c->home];
	bool told = e->known & TDB_K_RSP, push = told && e->rsp == e->addr;
	struct tdb_finding f;
	uint64_t key;

	if (e->addr >= home->lo || (told && !push))
		return;
	if (push) {
		f = finding_new(TDB_R_STACK_OVERFLOW, TDB_EV_RECORDED, index, e->cpu);
		f.lo = e->addr;
		f.hi = home->lo - e->addr < length ? home->lo : e->addr + length;
		raise_overflow(m, c, c->home, &f);
	}
	key = stack_key(m->in, home->lo);
	if (!stack_named(key) || key == c->home || m->in->stack[key].hi != home->lo || !m->frames.named[key].count)
		return;
	neighbours(m, e, index, key, push, bytes, length);
}
