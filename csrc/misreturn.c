/* misreturn.c - returns that pop no open frame: shifted by an error code, or through a frame that was consumed before. */
#include "core.h"

/* What a shifted return takes for RIP: the CS word above it, or the error code below. */
static bool shifted_word(const struct tdb_frame *f, uint64_t *word)
{
	*word = f->has_code ? f->saved.code : f->saved.cs;
	return f->saved.known & (f->has_code ? TDB_K_CODE : TDB_K_CS);
}

static bool explains(const struct tdb_frame *f, const struct tdb_event *e)
{
	uint64_t word;

	if (!(e->known & TDB_K_ADDR))
		return e->flags & TDB_F_FAULTED;
	return shifted_word(f, &word) && word == e->addr;
}

static struct node *shifted_on(const struct machine *m, uint64_t hi, bool code, const struct tdb_event *e, struct node *best)
{
	for (uint32_t id = frames_on(&m->frames, stack_key(m->in, hi))->head; id != NONE; id = m->frames.node[id].stack.next) {
		struct node *n = frame_at(m, id);

		if (n->f.hi != hi || n->f.fred || n->f.has_code != code || n->f.cpu != e->cpu)
			continue;
		if (!best || n->f.entry > best->f.entry)
			best = n;
	}
	return best;
}

struct node *find_shifted(const struct machine *m, const struct tdb_event *e)
{
	struct node *n = NULL;

	if (!(e->known & TDB_K_RSP))
		return NULL;
	if (e->rsp <= UINT64_MAX - 32)     /* rip_addr = R - 8: a code was dropped that was never pushed */
		n = shifted_on(m, e->rsp + 32, false, e, n);
	if (e->rsp <= UINT64_MAX - 48)     /* rip_addr = R + 8: it was not dropped */
		n = shifted_on(m, e->rsp + 48, true, e, n);
	return n && explains(&n->f, e) ? n : NULL;
}

void raise_shifted(struct machine *m, struct cpu *c, const struct tdb_frame *f, const struct tdb_event *e, uint32_t index)
{
	uint32_t *fold = &c->fold.shifted[f->vector < 32 ? f->vector : 32];
	struct tdb_finding finding;

	if (finding_folded(m, *fold))
		return;
	finding = finding_new(TDB_R_ERROR_CODE_MISMATCH, TDB_EV_RECORDED, index, e->cpu);
	finding.victim = *f;
	finding.consumer = index;
	finding.popped = popped_context(e);
	finding.lo = f->lo;
	finding.hi = f->hi;
	*fold = finding_raise(m, &finding);
}

static bool consumed_before(const struct cpu *c, uint32_t entry)
{
	for (uint32_t i = 0; i < CONSUMED_KEPT; i++)
		if (c->consumed[i] == entry)
			return true;
	return false;
}

static bool delivered_word(const struct machine *m, uint64_t addr, uint64_t popped, uint32_t *by)
{
	uint64_t value;
	uint8_t known;

	memory_load(&m->mem, addr, &value, &known, by);
	return known == 0xff && value == popped && *by != NONE && m->in->events[*by].kind == TDB_DELIVER;
}

void raise_unmatched(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	struct tdb_finding f;
	struct tdb_frame w;
	bool eret = e->known & TDB_K_ARG && (e->arg == TDB_RET_ERETU || e->arg == TDB_RET_ERETS);
	uint64_t at = e->rsp + (eret ? 8 : 0);
	uint32_t by, other;

	if (!(e->known & TDB_K_CS) || e->cs & 3)             /* user code can be resumed twice in one place */
		return;
	if (!(e->known & TDB_K_RSP) || !(e->known & TDB_K_ADDR) || !(e->known & TDB_K_VALUE) || e->rsp > UINT64_MAX - (eret ? 48 : 40))
		return;
	if (!delivered_word(m, at, e->addr, &by) || !delivered_word(m, at + 24, e->value, &other) || by != other ||
	    !consumed_before(c, by))
		return;
	w = frame_of_event(m, by);
	if (!saved_knows(&w, TDB_K_RIP | TDB_K_RSP) || w.saved.rip != e->addr || w.saved.rsp != e->value)
		return;
	if (finding_folded(m, c->fold.unmatched))
		return;
	f = finding_new(TDB_R_UNMATCHED_RETURN, TDB_EV_RECORDED, index, e->cpu);
	f.writer = w;
	f.consumer = index;
	f.popped = popped_context(e);
	f.lo = at;
	f.hi = at + 40;
	c->fold.unmatched = finding_raise(m, &f);
}
