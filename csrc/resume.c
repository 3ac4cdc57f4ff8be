/* resume.c - returns: which frame is consumed, and whether from the bytes that its own delivery stored. */
#include "core.h"

struct slot {
	uint64_t own, popped;
	uint64_t mask;                   /* bits that are compared */
	uint8_t bytes;                   /* bytes that are compared */
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
	uint8_t bytes[5] = { 0xff, 3, 0xf, 0xff, 3 };

	for (int i = 0; i < 5; i++)
		ret[i] = (struct slot){ own[i], popped[i], mask[i], bytes[i],
					s->known & saved_bit[i] && e->known & popped_bit[i] };
}

static uint8_t differing(const struct slot slot[5])
{
	uint8_t mask = 0;

	for (int i = 0; i < 5; i++)
		if (slot[i].known && (slot[i].own ^ slot[i].popped) & slot[i].mask)
			mask |= 1u << i;
	return mask;
}

/* What nearly every return does: it pops what was pushed. */
static bool all_equal(const struct tdb_context *s, const struct tdb_event *e)
{
	const uint32_t saved = TDB_K_RIP | TDB_K_RSP | TDB_K_RFLAGS | TDB_K_CS | TDB_K_SS;
	const uint32_t popped = TDB_K_ADDR | TDB_K_VALUE | TDB_K_RFLAGS | TDB_K_CS | TDB_K_SS;

	return (s->known & saved) == saved && (e->known & popped) == popped && s->rip == e->addr && s->rsp == e->value &&
	       !((s->rflags ^ e->rflags) & 0xffffffffull & ~(uint64_t)RF) && s->cs == e->cs && s->ss == e->ss;
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
		if ((known & slot[i].bytes) != slot[i].bytes || (value ^ slot[i].popped) & slot[i].mask || by == NONE || by == f->entry)
			continue;
		if (m->in->events[by].kind != TDB_DELIVER)
			continue;
		if (!mask)
			*writer = by;
		mask |= 1u << i;
	}
	return mask;
}

/* The newest frame with that hi of the CPU, else of any; IDT frames, FRED frames. */
static struct node *frame_with_top(const struct machine *m, uint64_t hi, uint16_t cpu, bool fred)
{
	struct node *any = NULL;

	for (uint32_t id = frames_on(&m->frames, stack_key(m->in, hi))->head; id != NONE; id = m->frames.node[id].stack.next) {
		struct node *n = frame_at(m, id);

		if (n->f.hi != hi || n->f.fred != fred)
			continue;
		if (n->f.cpu == cpu)
			return n;
		if (!any)
			any = n;
	}
	return any;
}

/* The frame that a return at this RSP pops. */
static struct node *find_frame(const struct machine *m, const struct tdb_event *e, enum tdb_return kind)
{
	uint64_t rsp = e->rsp;
	struct node *n, *other;

	if (!(e->known & TDB_K_RSP) || rsp > UINT64_MAX - 40)
		return NULL;
	if (kind != TDB_RET_IRET)
		return rsp > UINT64_MAX - 64 ? NULL : frame_with_top(m, rsp + 64, e->cpu, true);
	n = frame_with_top(m, rsp + 40, e->cpu, false);
	if (likely(!m->any_fred) || rsp > UINT64_MAX - 56)
		return n;
	other = frame_with_top(m, rsp + 56, e->cpu, true);
	if (!n || !other)
		return n ? n : other;
	if ((n->f.cpu == e->cpu) != (other->f.cpu == e->cpu))
		return n->f.cpu == e->cpu ? n : other;
	return n->f.entry > other->f.entry ? n : other;
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

struct tdb_context popped_context(const struct tdb_event *e)
{
	return (struct tdb_context){
		.rip = e->addr, .rsp = e->value, .rflags = e->rflags, .cs = e->cs, .ss = e->ss,
		.known = (e->known & (TDB_K_CS | TDB_K_SS | TDB_K_RFLAGS)) | (e->known & TDB_K_ADDR ? TDB_K_RIP : 0) |
			 (e->known & TDB_K_VALUE ? TDB_K_RSP : 0),
	};
}

struct tdb_frame frame_of_event(const struct machine *m, uint32_t index)
{
	const struct tdb_event *e = &m->in->events[index];
	struct tdb_frame f = {
		.entry = index, .clobbered_by = NONE, .finding = NONE, .victim = NONE, .cpu = e->cpu, .vector = e->arg,
		.source = e->known & TDB_K_SOURCE && e->source < SOURCES ? e->source : TDB_SRC_UNKNOWN, .gs = 2,
		.ring_gap = NONE, .overwritten_by = NONE,
		.saved = { .rip = e->rip, .rsp = e->rsp, .rflags = e->rflags, .cs = e->cs, .ss = e->ss,
			   .known = e->known & (TDB_K_RIP | TDB_K_RSP | TDB_K_RFLAGS | TDB_K_CS | TDB_K_SS) },
	};

	if (f.source == TDB_SRC_SOFT_INT || f.source == TDB_SRC_SYSCALL) {
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
	c->loop_victim = f->entry;
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

static void remember_consumed(struct cpu *c, uint32_t entry)
{
	c->consumed[c->consumed_at++ % CONSUMED_KEPT] = entry;
}

/* Close the frame that a return at its address consumes. */
static void consume(struct machine *m, struct cpu *c, struct node *n, const struct tdb_event *e, uint32_t index)
{
	const struct tdb_frame *f = &n->f;       /* a closed node keeps its frame until another is opened */
	struct slot slot[5];
	uint8_t differ, other;
	uint32_t by = NONE;

	frame_close(m, n, TDB_SETTLE_RETURN);
	remember_consumed(c, f->entry);
	if (likely(f->status != TDB_FRAME_CLOBBERED && all_equal(&f->saved, e)))
		return;
	make_slots(f, e, slot);
	differ = differing(slot);
	if (!differ) {
		/* That its own words came back is shown only by words that are known. */
		if (f->status == TDB_FRAME_CLOBBERED && slot[0].known && slot[3].known)
			finding_settle(m, f->finding, TDB_R_FRAME_RELOCATED, TDB_EV_RECORDED, index, TDB_SETTLE_RETURN);
		return;
	}
	other = foreign(m, f, slot, differ, &by);
	/* A frame that nothing overwrote is only called so if the place it resumes at is foreign. */
	if (other && (f->status == TDB_FRAME_CLOBBERED || other & (1u << 0 | 1u << 3)))
		consumed(m, c, f, differ, other, by, e, index);
}

static bool turns_loop(const struct cpu *c, const struct tdb_event *e)
{
	const uint32_t told = TDB_K_RSP | TDB_K_ADDR | TDB_K_VALUE;

	return c->loop_finding != NONE && (e->known & told) == told && e->rsp == c->loop_rsp && e->addr == c->loop_rip &&
	       e->value == c->loop_sp;
}

static bool contradicted(const struct tdb_frame *f, const struct tdb_event *e)
{
	struct slot slot[5];

	make_slots(f, e, slot);
	return differing(slot);
}

/* The depth of the newest frame further out to whose RIP a return went that did not go to that of the frame at its depth, or the
 * CPU's depth: the handlers in between were not returned from. */
static uint32_t left_out_to(struct machine *m, const struct cpu *c, const struct tdb_event *e)
{
	uint32_t found = c->depth;
	bool passed = false, any = false;

	for (uint32_t id = m->watch[e->cpu].head; id != NONE; id = m->frames.node[id].watch.next) {
		const struct tdb_frame *f = &m->frames.node[id].f;

		if (f->depth == c->depth)
			passed |= contradicted(f, e);
		else if (f->depth < c->depth && saved_knows(f, TDB_K_RIP) && e->known & TDB_K_ADDR && !contradicted(f, e) &&
			 (!any || f->depth > found)) {
			found = f->depth;
			any = true;
		}
	}
	return passed ? found : c->depth;
}

/*
 * Where it popped from is not known.  If deliveries and returns nest, what was entered as deep as it came from is done, unless the
 * words that it popped say that it was not that.
 */
static void close_nested(struct machine *m, struct cpu *c, const struct tdb_event *e)
{
	uint32_t depth = left_out_to(m, c, e), next;

	for (uint32_t id = m->watch[e->cpu].head; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = n->watch.next;
		if (n->f.depth >= depth && (depth < c->depth || !contradicted(&n->f, e)))
			frame_close(m, n, TDB_SETTLE_NESTING);
	}
	c->depth = depth;
}

/* A return where no open frame is: the frame, closed now, that it stands for, or NULL. */
static struct node *resume_elsewhere(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	bool iret = !(e->known & TDB_K_ARG) || e->arg == TDB_RET_IRET || e->arg > TDB_RET_ERETS;
	struct node *n = find_copied(m, e);

	if (n) {
		if (n->f.status == TDB_FRAME_CLOBBERED)
			finding_settle(m, n->f.finding, TDB_R_FRAME_RELOCATED, TDB_EV_RECORDED, index, TDB_SETTLE_COPY);
		frame_close(m, n, TDB_SETTLE_COPY);
		remember_consumed(c, n->f.entry);
		return n;
	}
	if (!(e->known & TDB_K_RSP)) {
		close_nested(m, c, e);
		return NULL;
	}
	n = iret ? find_shifted(m, e) : NULL;
	if (n) {
		raise_shifted(m, c, &n->f, e, index);
		frame_close(m, n, TDB_SETTLE_RETURN);
		remember_consumed(c, n->f.entry);
		return n;
	}
	if (turns_loop(c, e))
		finding_count_again(m, c->loop_finding);
	else if (m->in->fidelity & TDB_FID_RETURNS)
		raise_unmatched(m, c, e, index);
	return NULL;
}

/* A return that pops no 64-bit frame of this system: 32-bit, real mode, in SMM. */
static void resume_unseen(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	bool was = nmi_unblocked(c);

	if (!was)
		nmi_unblock(c, index, NONE);
	if (c->s.smm)
		c->smm_iret = index;
	cpu_forget_registers(c);
	if (!(e->flags & TDB_F_SMM))
		window_nmi(m, c, e->cpu, was);
}

static void resume_faulted(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	struct node *n = find_frame(m, e, TDB_RET_IRET) || find_copied(m, e) ? NULL : find_shifted(m, e);
	bool was = nmi_unblocked(c);

	if (n)
		raise_shifted(m, c, &n->f, e, index);
	if (!m->in->cfg.iret_fault_unblocks)
		return;
	if (!was)
		nmi_unblock(c, index, NONE);
	window_nmi(m, c, e->cpu, was);
}

/* ERETU, ERETS unblock NMIs only by the NMI bit of the popped SS word (R35). */
static void eret_masking(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index, const struct tdb_frame *f)
{
	bool told = e->known & TDB_K_CODE;

	if (told ? e->code >> 2 & 1 : f && f->source == TDB_SRC_NMI) {
		if (!nmi_unblocked(c))
			nmi_unblock(c, index, f ? f->entry : NONE);
	} else if (!told && !f) {
		if (!nmi_unblocked(c))
			c->s.known &= ~TDB_CK_NMI;
	} else if (f && c->s.known & TDB_CK_NMI && c->s.nmi_blocked && f->entry == c->s.nmi_since) {
		raise_stuck(m, c, e->cpu, index, TDB_EV_RECORDED, f);
	}
}

/* Bits 17:16 of the CS word that an ERETS at this RSP pops. */
static bool popped_level(const struct machine *m, const struct tdb_event *e, uint8_t *ret)
{
	uint64_t value;
	uint8_t known;
	uint32_t by;

	if (!(e->known & TDB_K_RSP) || e->rsp > UINT64_MAX - 18)
		return false;
	memory_load(&m->mem, e->rsp + 18, &value, &known, &by);
	*ret = value & 3;
	return known & 1;
}

static void apply_eret(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index, const struct tdb_frame *f)
{
	eret_masking(m, c, e, index, f);
	if (e->arg == TDB_RET_ERETU) {
		c->s.csl = 0;
		c->s.gs = 0;
		c->s.known |= TDB_CK_CSL;
	} else {
		bool told = true;

		if (f)
			c->s.csl = f->from_level;
		else
			told = popped_level(m, e, &c->s.csl);
		cpu_set_known(c, TDB_CK_CSL, told);
	}
}

/* The frame came in a ring gap, and the return goes back into it. */
static void back_into_gap(struct cpu *c, const struct tdb_frame *f, const struct tdb_event *e)
{
	if (!(e->known & TDB_K_CS) || e->cs & 3 || !(e->known & TDB_K_VALUE) || e->value != f->saved.rsp)
		return;
	c->s.ring_gap = f->ring_gap;
	c->ring_rsp = e->value;
	c->ring_rsp_known = true;
	c->ring_mov_ss = NONE;
}

int resume_apply(struct machine *m, const struct tdb_event *e, uint32_t index)
{
	struct cpu *c = &m->cpu[e->cpu];
	enum tdb_return kind = e->known & TDB_K_ARG && e->arg <= TDB_RET_ERETS ? e->arg : TDB_RET_IRET;
	bool was = nmi_unblocked(c);
	const struct tdb_frame *f;
	struct tdb_context popped;
	struct node *n;

	m->stats.returns++;
	if (unlikely(e->flags & (TDB_F_LEGACY | TDB_F_SMM) || c->s.smm)) {
		resume_unseen(m, c, e, index);
		return TDB_OK;
	}
	if (in_guest(m, c)) {
		cpu_forget_registers(c);
		return TDB_OK;
	}
	if (e->flags & TDB_F_FAULTED) {
		if (kind == TDB_RET_IRET)
			resume_faulted(m, c, e, index);
		return TDB_OK;
	}
	c->depth -= c->depth > 0;
	n = find_frame(m, e, kind);
	if (n && unlikely(c->loop_finding != NONE) && n->f.entry < c->loop_victim && turns_loop(c, e)) {
		finding_count_again(m, c->loop_finding);   /* an older frame at this address has nothing to do with it */
		n = NULL;
	} else if (n) {
		consume(m, c, n, e, index);
	} else {
		n = resume_elsewhere(m, c, e, index);
	}
	f = n ? &n->f : NULL;
	if (kind != TDB_RET_IRET)
		apply_eret(m, c, e, index, f);
	else if (!was)
		nmi_unblock(c, index, f ? f->entry : NONE);
	if (f && f->ist)
		c->s.token_busy &= (uint8_t)~(1u << f->ist);
	popped = popped_context(e);
	cpu_set_registers(c, &popped);
	cpu_come_home(m, c);
	c->s.ring_gap = NONE;
	if (f && unlikely(f->ring_gap != NONE))
		back_into_gap(c, f, e);
	if (e->known & TDB_K_CS && e->cs & 3) {
		if (e->known & TDB_K_VALUE && (e->cs & 3) == 3) {
			c->s.user_rsp = e->value;
			c->s.known |= TDB_CK_USER_RSP;
		}
		observe_outer(m, e->cpu, index, false, NULL);
	}
	window_nmi(m, c, e->cpu, was);
	return TDB_OK;
}
