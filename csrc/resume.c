/* resume.c - returns: which frame is consumed, and whether from the bytes that its own delivery stored. */
#include "core.h"

struct slot {
	uint64_t own, popped;
	uint64_t mask;                   /* bits that are compared */
	bool known;                      /* on both sides */
};

static const uint32_t saved_bit[5] = { TDB_K_RIP, TDB_K_CS, TDB_K_RFLAGS, TDB_K_RSP, TDB_K_SS };
static const uint32_t popped_bit[5] = { TDB_K_ADDR, TDB_K_CS, TDB_K_RFLAGS, TDB_K_VALUE, TDB_K_SS };

/* The five words in the order of their addresses. */
static void make_slots(const struct tdb_frame *f, const struct tdb_event *e, struct slot ret[5])
{
	const struct tdb_context *s = &f->saved;
	uint64_t own[5] = { s->rip, s->cs, s->rflags, s->rsp, s->ss };
	uint64_t popped[5] = { e->addr, e->cs, e->rflags, e->value, e->ss };
	uint64_t mask[5] = { ~0ull, 0xffff, 0xffffffffull & ~(uint64_t)RF, ~0ull, 0xffff };

	for (int i = 0; i < 5; i++)
		ret[i] = (struct slot){ own[i], popped[i], mask[i], s->known & saved_bit[i] && e->known & popped_bit[i] };
}

static uint8_t differing(const struct slot slot[5])
{
	uint8_t mask = 0;

	for (int i = 0; i < 5; i++)
		if (slot[i].known && (slot[i].own ^ slot[i].popped) & slot[i].mask)
			mask |= 1u << i;
	return mask;
}

/* Those of the slots that were popped from bytes that another delivery stored; *writer: of the lowest one. */
static uint8_t foreign(const struct machine *m, const struct tdb_frame *f, const struct slot slot[5], uint8_t among,
		       uint32_t *writer)
{
	uint8_t mask = 0;

	for (int i = 0; i < 5; i++) {
		uint64_t value;
		uint8_t known;
		uint32_t by;

		if (!(among >> i & 1))
			continue;
		memory_load(&m->mem, frame_rip_addr(f) + 8 * i, &value, &known, &by);
		if (known != 0xff || (value ^ slot[i].popped) & slot[i].mask || by == NONE || by == f->entry)
			continue;
		if (m->in->events[by].kind != TDB_DELIVER)
			continue;
		if (!mask)
			*writer = by;
		mask |= 1u << i;
	}
	return mask;
}

static struct node *find_frame(const struct machine *m, uint64_t rsp, uint16_t cpu)
{
	struct node *any = NULL;

	if (rsp > UINT64_MAX - 40)
		return NULL;
	for (uint32_t id = frames_on(&m->frames, stack_key(m->in, rsp + 40))->head; id != NONE;
	     id = m->frames.node[id].stack.next) {
		struct node *n = frame_at(m, id);

		if (frame_rip_addr(&n->f) != rsp)
			continue;
		if (n->f.cpu == cpu)
			return n;
		if (!any)
			any = n;
	}
	return any;
}

/* A frame whose context is popped from somewhere else: software had copied it. */
static struct node *find_copied(const struct machine *m, const struct tdb_event *e)
{
	const uint32_t popped = TDB_K_ADDR | TDB_K_VALUE | TDB_K_CS | TDB_K_SS;
	const uint32_t saved = TDB_K_RIP | TDB_K_RSP | TDB_K_CS | TDB_K_SS;

	if ((e->known & popped) != popped)
		return NULL;
	for (uint32_t id = m->watch[e->cpu].head; id != NONE; id = m->frames.node[id].watch.next) {
		struct node *n = frame_at(m, id);

		if (saved_knows(&n->f, saved) && n->f.saved.rip == e->addr && n->f.saved.rsp == e->value &&
		    n->f.saved.cs == e->cs && n->f.saved.ss == e->ss)
			return n;
	}
	return NULL;
}

static struct tdb_context popped_context(const struct tdb_event *e)
{
	return (struct tdb_context){
		.rip = e->addr, .rsp = e->value, .rflags = e->rflags, .cs = e->cs, .ss = e->ss,
		.known = (e->known & (TDB_K_CS | TDB_K_SS | TDB_K_RFLAGS)) | (e->known & TDB_K_ADDR ? TDB_K_RIP : 0) |
			 (e->known & TDB_K_VALUE ? TDB_K_RSP : 0),
	};
}

/* What is known of a delivery from its record alone. */
static struct tdb_frame frame_of_event(const struct machine *m, uint32_t index)
{
	const struct tdb_event *e = &m->in->events[index];
	struct tdb_frame f = {
		.entry = index, .clobbered_by = NONE, .finding = NONE, .victim = NONE, .cpu = e->cpu, .vector = e->arg,
		.source = e->known & TDB_K_SOURCE && e->source < SOURCES ? e->source : TDB_SRC_UNKNOWN,
		.saved = { .rip = e->rip, .rsp = e->rsp, .rflags = e->rflags, .cs = e->cs, .ss = e->ss,
			   .known = e->known & (TDB_K_RIP | TDB_K_RSP | TDB_K_RFLAGS | TDB_K_CS | TDB_K_SS) },
	};

	if (f.source == TDB_SRC_SOFT_INT) {
		f.saved.rip += e->code;
		if (!(e->known & TDB_K_CODE))
			f.saved.known &= ~TDB_K_RIP;
	}
	return f;
}

static void raise_loop(struct machine *m, struct cpu *c, const struct tdb_frame *f, const struct tdb_frame *writer,
		       const struct tdb_event *e, uint32_t index)
{
	struct tdb_finding finding = finding_new(TDB_R_RESUME_LOOP, TDB_EV_RECORDED, index, e->cpu);

	finding.victim = *f;
	finding.writer = *writer;
	finding.consumer = index;
	finding.lo = f->lo;
	finding.hi = f->hi;
	finding.popped = popped_context(e);
	c->loop_finding = finding_raise(m, &finding);
	c->loop_rsp = e->rsp;
	c->loop_rip = e->addr;
	c->loop_sp = e->value;
}

static void consumed(struct machine *m, struct cpu *c, const struct tdb_frame *f, uint8_t differ, uint8_t slots, uint32_t by,
		     const struct tdb_event *e, uint32_t index)
{
	struct tdb_frame writer = frame_of_event(m, by);
	struct tdb_context popped = popped_context(e);

	if (f->status == TDB_FRAME_CLOBBERED) {
		finding_consumed(m, f->finding, index, &popped);
	} else {
		struct tdb_finding finding = finding_new(TDB_R_FRAME_CONSUMED_CORRUPT, TDB_EV_RECORDED, index, e->cpu);
		uint32_t last = 31 - (uint32_t)__builtin_clz(slots), low = (uint32_t)__builtin_ctz(slots);

		finding.victim = *f;
		finding.writer = writer;
		finding.consumer = index;
		finding.slots = finding.differ = slots;
		finding.lo = frame_rip_addr(f) + 8 * low;
		finding.hi = frame_rip_addr(f) + 8 * last + 8;
		finding.popped = popped;
		finding_raise(m, &finding);
	}
	if (differ & (1u << 0 | 1u << 3) && saved_knows(&writer, TDB_K_RIP | TDB_K_RSP) && e->known & TDB_K_ADDR && e->known & TDB_K_VALUE &&
	    e->addr == writer.saved.rip && e->value == writer.saved.rsp && f->cpu == e->cpu && writer.cpu == e->cpu)
		raise_loop(m, c, f, &writer, e, index);
}

/* Close the frame that a return at its address consumes; returns its entry. */
static uint32_t consume(struct machine *m, struct cpu *c, struct node *n, const struct tdb_event *e, uint32_t index)
{
	struct tdb_frame f = n->f;
	struct slot slot[5];
	uint8_t differ, other;
	uint32_t by = NONE;

	make_slots(&f, e, slot);
	differ = differing(slot);
	frame_close(m, n, TDB_SETTLE_RETURN);
	if (!differ) {
		/* That its own words came back is shown only by words that are known. */
		if (f.status == TDB_FRAME_CLOBBERED && slot[0].known && slot[3].known)
			finding_settle(m, f.finding, TDB_R_FRAME_RELOCATED, TDB_EV_RECORDED, index, TDB_SETTLE_RETURN);
		return f.entry;
	}
	other = foreign(m, &f, slot, differ, &by);
	/* A frame that nothing overwrote is only called so if the place it resumes at is foreign. */
	if (other && (f.status == TDB_FRAME_CLOBBERED || other & (1u << 0 | 1u << 3)))
		consumed(m, c, &f, differ, other, by, e, index);
	return f.entry;
}

static uint32_t resume_elsewhere(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	struct node *n = find_copied(m, e);
	uint32_t entry;

	if (n) {
		entry = n->f.entry;
		if (n->f.status == TDB_FRAME_CLOBBERED)
			finding_settle(m, n->f.finding, TDB_R_FRAME_RELOCATED, TDB_EV_RECORDED, index, TDB_SETTLE_COPY);
		frame_close(m, n, TDB_SETTLE_COPY);
		return entry;
	}
	if (c->loop_finding != NONE && e->known & TDB_K_RSP && e->known & TDB_K_ADDR && e->known & TDB_K_VALUE &&
	    e->rsp == c->loop_rsp && e->addr == c->loop_rip && e->value == c->loop_sp)
		finding_count_again(m, c->loop_finding);
	return NONE;
}

int resume_apply(struct machine *m, const struct tdb_event *e, uint32_t index)
{
	struct cpu *c = &m->cpu[e->cpu];
	bool unblocked = c->s.known & TDB_CK_NMI && !c->s.nmi_blocked;
	struct tdb_context popped;
	struct node *n = NULL;
	uint32_t entry;

	m->stats.returns++;
	if (e->flags & TDB_F_FAULTED) {                    /* R12 */
		if (m->in->cfg.iret_fault_unblocks && !unblocked)
			nmi_unblock(c, index, NONE);
		return TDB_OK;
	}
	if (e->flags & TDB_F_LEGACY) {                     /* no 64-bit frame was popped, but NMIs are unblocked (R12) */
		if (!unblocked)
			nmi_unblock(c, index, NONE);
		cpu_set_registers(c, &(struct tdb_context){ 0 });
		return TDB_OK;
	}
	if (e->known & TDB_K_RSP)
		n = find_frame(m, e->rsp, e->cpu);
	entry = n ? consume(m, c, n, e, index) : resume_elsewhere(m, c, e, index);
	if (!unblocked)
		nmi_unblock(c, index, entry);
	popped = popped_context(e);
	cpu_set_registers(c, &popped);
	if (e->known & TDB_K_CS && e->cs & 3) {
		if (e->known & TDB_K_VALUE && (e->cs & 3) == 3) {
			c->s.user_rsp = e->value;
			c->s.known |= TDB_CK_USER_RSP;
		}
		observe_outer(m, e->cpu, index);
	}
	return TDB_OK;
}
