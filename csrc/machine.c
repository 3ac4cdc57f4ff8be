/* machine.c - one machine's state and the application of one event to it. */
#include <stdlib.h>

#include "core.h"

/* -- life ------------------------------------------------------------------------------------------------------------ */

static void gates_release(struct gates *g)
{
	if (g && !--g->refs)
		free(g);
}

static void cpu_reset(struct cpu *c)
{
	uint32_t event = c->s.event;

	memset(&c->s, 0, sizeof(c->s));
	c->s.event = event;
	c->s.nmi_since = c->s.nmi_unblocked_by = c->s.nmi_unblock_frame = NONE;
	c->s.tss = c->s.idt = -1;
	c->s.ring_gap = NONE;
	c->failed[0] = c->failed[1] = NONE;
	c->placed = NONE;
	c->loop_finding = NONE;
	c->home = NO_STACK;
	c->stuck = false;
	c->token_reported = 0;
	c->ring_mov_ss = c->shadow_event = c->smm_iret = NONE;
	c->msr_known = 0;
	memset(c->consumed, 0xff, sizeof(c->consumed));
	c->consumed_at = 0;
	c->depth = 0;
}

static int load_tables(struct machine *m, const struct tdb_layout *l)
{
	memcpy(m->tss, l->tss, l->tss_count * sizeof(*m->tss));
	for (uint32_t i = 0; i < l->idt_count; i++) {
		m->idt[i] = malloc(sizeof(**m->idt));
		if (!m->idt[i])
			return TDB_E_NOMEM;
		m->idt[i]->refs = 1;
		m->idt[i]->base = l->idt[i].base;
		memcpy(m->idt[i]->gate, l->idt[i].gate, sizeof(m->idt[i]->gate));
		gates_summarize(m->idt[i]);
	}
	for (uint32_t i = 0; i < l->cpu_count && i < m->in->cpus; i++) {
		m->cpu[i].s.tss = l->cpu[i].tss;
		m->cpu[i].s.idt = l->cpu[i].idt;
		if (l->fred) {
			m->cpu[i].s.levels = l->fred[i];
			m->cpu[i].s.fred = l->fred[i].on != 0;
			m->cpu[i].s.csl = l->fred[i].config & 3;
			cpu_set_known(&m->cpu[i], TDB_CK_CSL, l->fred[i].known & TDB_FK_CONFIG);
		}
	}
	for (uint32_t i = 0; i < l->memory_count; i++) {
		const struct tdb_memory *r = &l->memory[i];
		uint64_t done = 0;

		while (done < r->length) {
			uint32_t part = r->length - done < PAGE_WORDS * 8 ? (uint32_t)(r->length - done) : PAGE_WORDS * 8;
			int status = memory_store(&m->mem, r->addr + done, r->bytes + done, part, NONE);

			if (status)
				return status;
			done += part;
		}
	}
	return TDB_OK;
}

int machine_init(struct machine *m, const struct inputs *in, const struct tdb_layout *layout, uint64_t *bytes)
{
	int status;

	*m = (struct machine){ .in = in, .stats.first_bad = UINT64_MAX };
	m->cpu = calloc(in->cpus, sizeof(*m->cpu));
	m->watch = calloc(in->cpus, sizeof(*m->watch));
	m->mine = calloc(in->cpus, sizeof(*m->mine));
	m->tss = calloc(in->tss_count + 1, sizeof(*m->tss));
	m->idt = calloc(in->idt_count + 1, sizeof(*m->idt));
	if (!m->cpu || !m->watch || !m->mine || !m->tss || !m->idt || memory_init(&m->mem, in->cfg.max_pages, (uintptr_t)in, bytes) ||
	    frames_init(&m->frames, in)) {
		machine_deinit(m);
		return TDB_E_NOMEM;
	}
	for (uint32_t i = 0; i < in->cpus; i++) {
		m->cpu[i].s.event = NONE;
		cpu_reset(&m->cpu[i]);
		memset(&m->cpu[i].fold, 0xff, sizeof(m->cpu[i].fold));
		m->watch[i] = m->mine[i] = (struct list){ NONE, NONE, 0 };
	}
	status = load_tables(m, layout);
	if (status)
		machine_deinit(m);
	return status;
}

void machine_deinit(struct machine *m)
{
	for (uint32_t i = 0; m->idt && i < m->in->idt_count; i++)
		gates_release(m->idt[i]);
	free(m->cpu);
	free(m->watch);
	free(m->mine);
	free(m->tss);
	free(m->idt);
	memory_deinit(&m->mem);
	frames_deinit(&m->frames);
	m->cpu = NULL;
	m->watch = m->mine = NULL;
	m->tss = NULL;
	m->idt = NULL;
}

/* -- registers ---------------------------------------------------------------------------------------------------- */

void cpu_set_registers(struct cpu *c, const struct tdb_context *at)
{
	c->s.known &= ~REGISTERS_KNOWN;
	c->s.rip = at->rip;
	c->s.rsp = at->rsp;
	c->s.cs = at->cs;
	c->s.ss = at->ss;
	c->s.rflags = (uint32_t)at->rflags;
	c->s.known |= (at->known & TDB_K_RIP ? TDB_CK_RIP : 0) | (at->known & TDB_K_RSP ? TDB_CK_RSP : 0) |
		      (at->known & TDB_K_CS ? TDB_CK_CS : 0) | (at->known & TDB_K_SS ? TDB_CK_SS : 0) |
		      (at->known & TDB_K_RFLAGS ? TDB_CK_RFLAGS : 0);
}

void cpu_forget_registers(struct cpu *c)
{
	c->s.known &= ~REGISTERS_KNOWN;
	c->s.rip = c->s.rsp = 0;
	c->s.cs = c->s.ss = 0;
	c->s.rflags = 0;
	c->home = NO_STACK;
}

void cpu_come_home(const struct machine *m, struct cpu *c)
{
	c->home = c->s.known & TDB_CK_RSP ? stack_key(m->in, c->s.rsp) : NO_STACK;
}

/* -- events that change memory ---------------------------------------------------------------------------------------- */

static int apply_write(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	bool known = e->known & TDB_K_VALUE, far = e->flags & TDB_F_BYTES;
	uint32_t length = far ? e->code : e->arg;
	const uint8_t *bytes = (const uint8_t *)&e->value;

	if (!(e->known & TDB_K_ADDR) || !(e->known & (far ? TDB_K_CODE : TDB_K_ARG)) || !length ||
	    length > (far ? WRITE_LIMIT : 8)) {
		machine_refuse(m);
		return TDB_OK;
	}
	if (far && known) {
		if (e->value > m->in->bytes_size || length > m->in->bytes_size - e->value) {
			machine_refuse(m);
			return TDB_OK;
		}
		bytes = m->in->bytes + e->value;
	}
	m->stats.writes++;
	if (stack_named(c->home) && !(m->in->stack[c->home].flags & TDB_STACK_ASSUMED))
		overflow_write(m, c, e, index, known ? bytes : NULL, length);
	return memory_store(&m->mem, e->addr, known ? bytes : NULL, length, index);
}

static struct node *movable(const struct machine *m, uint64_t key, const struct tdb_event *e, struct node *best)
{
	for (uint32_t id = frames_on(&m->frames, key)->head; id != NONE; id = m->frames.node[id].stack.next) {
		struct node *n = frame_at(m, id);

		if (n->f.cpu != e->cpu || n->f.status != TDB_FRAME_LIVE)
			continue;
		if (n->f.lo != e->addr && frame_rip_addr(&n->f) != e->addr)
			continue;
		if (!best || n->f.entry > best->f.entry)
			best = n;
	}
	return best;
}

static int apply_move(struct machine *m, const struct tdb_event *e, uint32_t index)
{
	struct node *n;
	uint8_t bytes[64], known[8];
	uint64_t length, value;
	uint32_t by;

	if (!(e->known & TDB_K_ADDR) || e->addr > UINT64_MAX - 64)
		return TDB_OK;
	n = movable(m, stack_key(m->in, e->addr + 40), e, NULL);
	n = movable(m, stack_key(m->in, e->addr + 48), e, n);
	n = movable(m, stack_key(m->in, e->addr + 56), e, n);
	n = movable(m, stack_key(m->in, e->addr + 64), e, n);
	if (!n)
		return TDB_OK;
	n->f.status = TDB_FRAME_MOVED;
	if (!(e->known & TDB_K_VALUE))
		return TDB_OK;
	length = n->f.hi - e->addr;
	for (uint64_t i = 0; i < length; i += 8) {
		memory_load(&m->mem, e->addr + i, &value, &known[i / 8], &by);
		memcpy(bytes + i, &value, 8);
	}
	for (uint64_t i = 0; i < length && e->value + i >= e->value; i++) {
		bool have = known[i / 8] >> (i & 7) & 1;
		int status = memory_store(&m->mem, e->value + i, have ? &bytes[i] : NULL, 1, index);

		if (status)
			return status;
	}
	return TDB_OK;
}

/* -- events that end knowledge ------------------------------------------------------------------------------------------ */

static void drop_frames(struct machine *m, bool all, uint16_t cpu)
{
	uint32_t next;

	for (uint32_t id = all ? m->frames.age.head : m->mine[cpu].head; id != NONE; id = next) {
		struct node *n = frame_at(m, id);

		next = all ? n->age.next : n->mine.next;
		frame_close(m, n, TDB_SETTLE_DROPPED);
	}
}

static void apply_gap(struct machine *m, const struct tdb_event *e, uint32_t index)
{
	bool all = !(e->known & TDB_K_CPU);
	struct tdb_finding f = finding_new(TDB_R_TRACE_GAP, TDB_EV_RECORDED, index, all ? UINT16_MAX : e->cpu);

	m->stats.gaps++;
	finding_raise(m, &f);
	drop_frames(m, all, e->cpu);
	for (uint32_t i = all ? 0 : e->cpu; i < (all ? m->in->cpus : e->cpu + 1u); i++) {
		struct cpu *c = &m->cpu[i];
		struct tdb_cpu kept = c->s;      /* tables and MSRs are mostly written once */
		uint32_t msr_known = c->msr_known;

		cpu_reset(c);
		c->s.tss = kept.tss;
		c->s.idt = kept.idt;
		c->s.fred = kept.fred;
		c->s.levels = kept.levels;
		c->msr_known = msr_known;
		c->s.gap = 1;
	}
	memory_clear(&m->mem);
}

static void apply_init(struct machine *m, struct cpu *c, const struct tdb_event *e)
{
	drop_frames(m, false, e->cpu);
	cpu_reset(c);
	c->s.gif = 1;
	c->s.known = TDB_CK_MCE | TDB_CK_TPR | TDB_CK_GIF;
	if (e->known & TDB_K_ARG && e->arg == 0)           /* RESET; what INIT leaves of both is not told */
		c->s.known |= TDB_CK_NMI | TDB_CK_MCIP;
}

/* -- one event ------------------------------------------------------------------------------------------------------------ */

static void apply_enter(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	uint8_t mismatch = 0;

	if (c->placed != NONE) {
		if (e->known & TDB_K_RSP && e->rsp != c->s.rsp)
			mismatch |= TDB_MM_ENTER_RSP;
		if (e->known & TDB_K_RIP && e->rip != c->s.rip)
			mismatch |= TDB_MM_ENTER_RIP;
		if (e->known & TDB_K_CS && c->s.known & TDB_CK_CS && e->cs != c->s.cs)
			mismatch |= TDB_MM_ENTER_CS;
	}
	if (mismatch) {
		struct tdb_finding f = finding_new(TDB_R_MODEL_MISMATCH, TDB_EV_RECORDED, index, e->cpu);

		f.detail = mismatch;
		f.cause_event = c->placed;
		finding_raise(m, &f);
	}
	if (e->known & TDB_K_RSP) {
		c->s.rsp = e->rsp;
		c->s.known |= TDB_CK_RSP;
	}
	if (e->known & TDB_K_RIP) {
		c->s.rip = e->rip;
		c->s.known |= TDB_CK_RIP;
	}
	if (e->known & TDB_K_CS) {
		c->s.cs = e->cs;
		c->s.known |= TDB_CK_CS;
	}
	if (e->known & TDB_K_SS) {
		c->s.ss = e->ss;
		c->s.known |= TDB_CK_SS;
	}
	if (e->known & TDB_K_RFLAGS) {
		c->s.rflags = e->rflags;
		c->s.known |= TDB_CK_RFLAGS;
	}
	if (e->known & TDB_K_RSP)
		cpu_come_home(m, c);
}

static void raise_shutdown(struct machine *m, const struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	uint8_t reason = e->known & TDB_K_ARG ? e->arg : TDB_SHUT_OTHER;
	const struct tdb_event *last = c->failed[0] == NONE ? NULL : &m->in->events[c->failed[0]];
	bool in_df = last && last->known & TDB_K_ARG && last->arg == VECTOR_DF && last->known & TDB_K_SOURCE &&
		     last->source == TDB_SRC_EXCEPTION;
	bool triple = reason == TDB_SHUT_TRIPLE_FAULT || (!(e->known & TDB_K_ARG) && in_df);
	struct tdb_finding f = finding_new(triple ? TDB_R_TRIPLE_FAULT : TDB_R_SHUTDOWN, TDB_EV_RECORDED, index, e->cpu);

	f.detail = triple ? TDB_SHUT_TRIPLE_FAULT : reason;
	if (triple) {
		f.cause_event = c->failed[0];
		f.cause_frame = c->failed[1];
	}
	finding_raise(m, &f);
}

static void apply_shadow(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	bool was = c->s.known & TDB_CK_RFLAGS && c->s.rflags & IF;

	c->s.shadow = 0;
	if (!(e->known & TDB_K_ARG) || e->arg > 1)
		return;
	c->s.shadow = (uint8_t)(e->arg + 1);
	c->shadow_event = index;
	if (e->arg == 0 && c->s.known & TDB_CK_RFLAGS) {
		c->s.rflags |= IF;
		if (!was)
			window_maskable(m, c, e->cpu, index);
	}
}

static void apply_flags(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	bool was = c->s.known & TDB_CK_RFLAGS && c->s.rflags & IF;

	c->s.rflags = e->rflags;
	cpu_set_known(c, TDB_CK_RFLAGS, e->known & TDB_K_RFLAGS);
	if (!was && c->s.known & TDB_CK_RFLAGS && c->s.rflags & IF)
		window_maskable(m, c, e->cpu, index);
}

static void apply_setsp(struct machine *m, struct cpu *c, const struct tdb_event *e)
{
	c->s.rsp = e->value;
	cpu_set_known(c, TDB_CK_RSP, e->known & TDB_K_VALUE);
	cpu_come_home(m, c);
	c->s.ring_gap = NONE;
}

static void apply_msr(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	bool was_clear = c->s.known & TDB_CK_MCIP && !c->s.mcip;

	system_msr(c, e);
	if (!was_clear && c->s.known & TDB_CK_MCIP && !c->s.mcip)
		window_mc(m, c, e->cpu, index);
}

static void apply_gs(struct cpu *c, const struct tdb_event *e)      /* R33 */
{
	if (!(e->known & TDB_K_ARG))
		return;
	if (e->arg == 0) {
		c->s.gs ^= 1;
	} else if (e->arg == 1) {
		c->s.gs = e->value >> 63;
		cpu_set_known(c, TDB_CK_GS, e->known & TDB_K_VALUE);
	}
}

static void apply_unblock(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	bool was = nmi_unblocked(c);

	if (e->known & TDB_K_ARG && e->arg == 1) {         /* STGI */
		c->s.gif = 1;
		c->s.known |= TDB_CK_GIF;
		return;
	}
	nmi_unblock(c, index, NONE);
	window_nmi(m, c, e->cpu, was);
}

static void apply_smi(struct cpu *c)                   /* R30 */
{
	if (c->s.smm)
		return;
	c->smm_nmi = nmi_state(c);
	c->smm_iret = NONE;
	c->s.smm = 1;
	c->s.nmi_blocked = 1;
	c->s.known |= TDB_CK_NMI;
}

static void apply_rsm(struct machine *m, struct cpu *c, const struct tdb_event *e)
{
	bool was = c->smm_nmi.known && !c->smm_nmi.blocked;

	cpu_forget_registers(c);
	if (!c->s.smm)
		return;
	c->s.smm = 0;
	c->s.nmi_since = c->smm_nmi.since;
	if (c->smm_iret != NONE) {
		nmi_unblock(c, c->smm_iret, NONE);
	} else {
		c->s.nmi_blocked = c->smm_nmi.blocked;
		cpu_set_known(c, TDB_CK_NMI, c->smm_nmi.known);
		c->s.nmi_unblocked_by = c->smm_nmi.unblocked_by;
		c->s.nmi_unblock_frame = c->smm_nmi.unblock_frame;
	}
	window_nmi(m, c, e->cpu, was);
}

static void apply_vmexit(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	struct tdb_context host = { .rip = e->rip, .rsp = e->rsp, .rflags = e->rflags, .cs = e->cs, .ss = e->ss,
				    .known = e->known & (TDB_K_RIP | TDB_K_RSP | TDB_K_RFLAGS | TDB_K_CS | TDB_K_SS) };

	cpu_set_registers(c, &host);
	cpu_come_home(m, c);
	c->s.ring_gap = NONE;
	c->s.guest = 0;
	if (e->known & TDB_K_ARG && e->arg == 1) {         /* R19: an NMI that ended the guest's run waits for STGI */
		c->s.gif = 0;
		c->s.known |= TDB_CK_GIF;
	} else if (e->known & TDB_K_SOURCE && e->source == TDB_SRC_NMI) {
		nmi_block(c, index);                       /* R18 */
	}
}

static void apply_vmentry(struct cpu *c)
{
	cpu_forget_registers(c);
	c->s.ring_gap = NONE;
	c->s.guest = 1;
	c->s.gif = 1;
	c->s.known |= TDB_CK_GIF;
}

static int dispatch(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	switch ((enum tdb_kind)e->kind) {
	case TDB_DELIVER:
		return deliver_apply(m, e, index);
	case TDB_RETURN:
		return resume_apply(m, e, index);
	case TDB_WRITE:
		return apply_write(m, c, e, index);
	case TDB_ENTER:
		apply_enter(m, c, e, index);
		break;
	case TDB_MOVE:
		return apply_move(m, e, index);
	case TDB_SETSP:
		apply_setsp(m, c, e);
		break;
	case TDB_FLAGS:
		apply_flags(m, c, e, index);
		break;
	case TDB_SHADOW:
		apply_shadow(m, c, e, index);
		break;
	case TDB_TSS:
		system_tss(m, c, e);
		break;
	case TDB_GATE:
		return system_gate(m, c, e);
	case TDB_LTR:
		system_ltr(m, c, e);
		break;
	case TDB_LIDT:
		system_lidt(m, c, e);
		break;
	case TDB_MSR:
		apply_msr(m, c, e, index);
		break;
	case TDB_CR:
		system_cr(c, e);
		break;
	case TDB_GS:
		apply_gs(c, e);
		break;
	case TDB_SYSCALL:
	case TDB_SYSENTER:
	case TDB_SYSRET:
		ring_apply(m, c, e, index);
		break;
	case TDB_RAISE:
		request_raised(m, c, e, index);
		break;
	case TDB_TOKEN:
		token_event(m, c, e, index);
		break;
	case TDB_UNBLOCK:
		apply_unblock(m, c, e, index);
		break;
	case TDB_SMI:
		apply_smi(c);
		break;
	case TDB_RSM:
		apply_rsm(m, c, e);
		break;
	case TDB_VMEXIT:
		apply_vmexit(m, c, e, index);
		break;
	case TDB_VMENTRY:
		apply_vmentry(c);
		break;
	case TDB_INIT:
		apply_init(m, c, e);
		break;
	case TDB_SHUTDOWN:
		raise_shutdown(m, c, e, index);
		break;
	case TDB_GAP:
		apply_gap(m, e, index);
		break;
	case TDB_READ:
	case TDB_EOI:
	case TDB_MODE:
	case TDB_MARK:
		break;
	}
	return TDB_OK;
}

/* Events that are not, or need not be, the instruction after STI or MOV SS. */
static bool keeps_shadow(uint8_t kind)
{
	return kind == TDB_ENTER || kind == TDB_WRITE || kind == TDB_READ || kind == TDB_RAISE || kind == TDB_EOI ||
	       kind == TDB_TOKEN || kind == TDB_MARK || kind == TDB_SHADOW;
}

int machine_apply(struct machine *m)
{
	uint32_t index = (uint32_t)m->position;
	const struct tdb_event *e = &m->in->events[index];
	bool cpu_known = e->known & TDB_K_CPU;
	struct cpu *c;
	int status;

	__builtin_prefetch(e + 16);            /* the trace is read once, from memory */
	m->position++;
	m->stats.events++;
	if (unlikely(e->kind < TDB_DELIVER || e->kind > TDB_MARK || (cpu_known ? e->cpu >= m->in->cpus : e->kind != TDB_GAP))) {
		machine_refuse(m);
		return TDB_OK;
	}
	if (unlikely(!cpu_known)) {
		apply_gap(m, e, index);
		return TDB_OK;
	}
	c = &m->cpu[e->cpu];
	c->s.event = index;
	status = dispatch(m, c, e, index);
	if (c->placed != index)
		c->placed = NONE;
	if (unlikely(c->s.shadow) && c->shadow_event != index && !keeps_shadow(e->kind))
		c->s.shadow = 0;
	return status;
}
