/* machine.c - one machine's state and the application of one event to it. */
#include <stdlib.h>

#include "core.h"

#define MSR_MCG_STATUS 0x17a

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
	}
	for (uint32_t i = 0; i < l->cpu_count && i < m->in->cpus; i++) {
		m->cpu[i].s.tss = l->cpu[i].tss;
		m->cpu[i].s.idt = l->cpu[i].idt;
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

	*m = (struct machine){ .in = in, .last_frame.entry = NONE };
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
		memset(m->cpu[i].fake, 0xff, sizeof(m->cpu[i].fake));
		memset(m->cpu[i].mismatch, 0xff, sizeof(m->cpu[i].mismatch));
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
	c->s.known &= TDB_CK_NMI | TDB_CK_MCIP | TDB_CK_USER_RSP;
	c->s.rip = at->rip;
	c->s.rsp = at->rsp;
	c->s.cs = at->cs;
	c->s.ss = at->ss;
	c->s.rflags = (uint32_t)at->rflags;
	c->s.known |= (at->known & TDB_K_RIP ? TDB_CK_RIP : 0) | (at->known & TDB_K_RSP ? TDB_CK_RSP : 0) |
		      (at->known & TDB_K_CS ? TDB_CK_CS : 0) | (at->known & TDB_K_SS ? TDB_CK_SS : 0) |
		      (at->known & TDB_K_RFLAGS ? TDB_CK_RFLAGS : 0);
}

/* -- events that change tables --------------------------------------------------------------------------------------- */

static void apply_tss(struct machine *m, const struct cpu *c, const struct tdb_event *e)
{
	struct tdb_tss *tss = c->s.tss >= 0 ? &m->tss[c->s.tss] : NULL;
	uint32_t bit = e->arg;
	uint64_t *slot;

	if (!(e->known & TDB_K_ARG) || !(e->arg <= 2 || (e->arg >= 9 && e->arg <= 15))) {
		m->stats.bad_events++;
		return;
	}
	if (!tss)
		return;
	slot = e->arg <= 2 ? &tss->rsp[e->arg] : &tss->ist[e->arg - 8];
	*slot = e->known & TDB_K_VALUE ? e->value : 0;
	tss->known &= ~(1u << bit);
	if (e->known & TDB_K_VALUE)
		tss->known |= 1u << bit;
}

static int apply_gate(struct machine *m, const struct cpu *c, const struct tdb_event *e)
{
	struct gates *g;
	struct tdb_gate *gate;

	if (!(e->known & TDB_K_ARG)) {
		m->stats.bad_events++;
		return TDB_OK;
	}
	if (c->s.idt < 0)
		return TDB_OK;
	g = m->idt[c->s.idt];
	if (g->refs > 1) {
		struct gates *copy = malloc(sizeof(*copy));

		if (!copy)
			return TDB_E_NOMEM;
		*copy = *g;
		copy->refs = 1;
		g->refs--;
		m->idt[c->s.idt] = g = copy;
	}
	gate = &g->gate[e->arg];
	*gate = (struct tdb_gate){ 0 };
	if ((e->known & (TDB_K_VALUE | TDB_K_CODE | TDB_K_CS)) != (TDB_K_VALUE | TDB_K_CODE | TDB_K_CS))
		return TDB_OK;
	gate->offset = e->value;
	gate->selector = e->cs;
	gate->ist = e->code & 7;
	gate->type = e->code >> 8 & 15;
	gate->dpl = e->code >> 13 & 3;
	gate->flags = TDB_GATE_KNOWN | (e->code >> 15 & 1 ? TDB_GATE_PRESENT : 0);
	return TDB_OK;
}

static int32_t find_tss(const struct machine *m, const struct tdb_event *e)
{
	for (uint32_t i = 0; e->known & TDB_K_VALUE && i < m->in->tss_count; i++)
		if (m->tss[i].base == e->value)
			return (int32_t)i;
	return -1;
}

static int32_t find_idt(const struct machine *m, const struct tdb_event *e)
{
	for (uint32_t i = 0; e->known & TDB_K_VALUE && i < m->in->idt_count; i++)
		if (m->idt[i]->base == e->value)
			return (int32_t)i;
	return -1;
}

/* -- events that change memory ---------------------------------------------------------------------------------------- */

static int apply_write(struct machine *m, const struct tdb_event *e, uint32_t index)
{
	bool known = e->known & TDB_K_VALUE, far = e->flags & TDB_F_BYTES;
	uint32_t length = far ? e->code : e->arg;
	const uint8_t *bytes = (const uint8_t *)&e->value;

	if (!(e->known & TDB_K_ADDR) || !(e->known & (far ? TDB_K_CODE : TDB_K_ARG)) || !length ||
	    length > (far ? WRITE_LIMIT : 8)) {
		m->stats.bad_events++;
		return TDB_OK;
	}
	if (far && known) {
		if (e->value > m->in->bytes_size || length > m->in->bytes_size - e->value) {
			m->stats.bad_events++;
			return TDB_OK;
		}
		bytes = m->in->bytes + e->value;
	}
	m->stats.writes++;
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
	uint8_t bytes[48], known[6];
	uint64_t length, value;
	uint32_t by;

	if (!(e->known & TDB_K_ADDR) || e->addr > UINT64_MAX - 48)
		return TDB_OK;
	n = movable(m, stack_key(m->in, e->addr + 40), e, NULL);
	n = movable(m, stack_key(m->in, e->addr + 48), e, n);
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
		int32_t tss = c->s.tss, idt = c->s.idt;

		cpu_reset(c);
		c->s.tss = tss;
		c->s.idt = idt;
		c->s.gap = 1;
	}
	memory_clear(&m->mem);
}

static void apply_init(struct machine *m, struct cpu *c, const struct tdb_event *e)
{
	drop_frames(m, false, e->cpu);
	cpu_reset(c);
	if (e->known & TDB_K_ARG && e->arg == 0)           /* RESET; what INIT leaves of both is not told */
		c->s.known = TDB_CK_NMI | TDB_CK_MCIP;
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
		if (e->known & TDB_K_CS && e->cs != c->s.cs)
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
}

static void set_known(struct cpu *c, uint32_t bit, bool known)
{
	c->s.known = known ? c->s.known | bit : c->s.known & ~bit;
}

static void raise_shutdown(struct machine *m, const struct tdb_event *e, uint32_t index)
{
	struct tdb_finding f = finding_new(TDB_R_SHUTDOWN, TDB_EV_RECORDED, index, e->cpu);

	f.detail = e->known & TDB_K_ARG ? e->arg : TDB_SHUT_OTHER;
	finding_raise(m, &f);
}

static int dispatch(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	switch ((enum tdb_kind)e->kind) {
	case TDB_DELIVER:
		return deliver_apply(m, e, index);
	case TDB_RETURN:
		return resume_apply(m, e, index);
	case TDB_WRITE:
		return apply_write(m, e, index);
	case TDB_ENTER:
		apply_enter(m, c, e, index);
		break;
	case TDB_MOVE:
		return apply_move(m, e, index);
	case TDB_SETSP:
		c->s.rsp = e->value;
		set_known(c, TDB_CK_RSP, e->known & TDB_K_VALUE);
		break;
	case TDB_FLAGS:
		c->s.rflags = e->rflags;
		set_known(c, TDB_CK_RFLAGS, e->known & TDB_K_RFLAGS);
		break;
	case TDB_TSS:
		apply_tss(m, c, e);
		break;
	case TDB_GATE:
		return apply_gate(m, c, e);
	case TDB_LTR:
		c->s.tss = find_tss(m, e);
		break;
	case TDB_LIDT:
		c->s.idt = find_idt(m, e);
		break;
	case TDB_SYSRET:
		observe_outer(m, e->cpu, index);
		c->s.known &= ~(TDB_CK_CS | TDB_CK_SS | TDB_CK_RIP | TDB_CK_RFLAGS);
		break;
	case TDB_SYSENTER:                         /* R31: only SYSENTER loads RSP */
		c->s.known &= ~TDB_CK_RSP;
		/* fall through */
	case TDB_SYSCALL:
		c->s.known &= ~(TDB_CK_CS | TDB_CK_SS | TDB_CK_RIP | TDB_CK_RFLAGS);
		break;
	case TDB_RAISE:
		if (e->known & TDB_K_ARG && e->arg == VECTOR_NMI && e->known & TDB_K_SOURCE && e->source == TDB_SRC_NMI &&
		    c->s.known & TDB_CK_NMI && c->s.nmi_blocked)
			c->s.nmi_pending = 1;
		break;
	case TDB_UNBLOCK:
		nmi_unblock(c, index, NONE);
		break;
	case TDB_MSR:
		if (e->known & TDB_K_CODE && e->code == MSR_MCG_STATUS) {
			c->s.mcip = e->value >> 2 & 1;
			set_known(c, TDB_CK_MCIP, e->known & TDB_K_VALUE);
		}
		break;
	case TDB_INIT:
		apply_init(m, c, e);
		break;
	case TDB_SHUTDOWN:
		raise_shutdown(m, e, index);
		break;
	case TDB_GAP:
		apply_gap(m, e, index);
		break;
	case TDB_RSM:                              /* it restores registers that no event tells */
		cpu_set_registers(c, &(struct tdb_context){ 0 });
		break;
	case TDB_READ:
	case TDB_SMI:
	case TDB_CR:
	case TDB_GS:
	case TDB_SHADOW:
	case TDB_EOI:
	case TDB_TOKEN:
	case TDB_VMEXIT:
	case TDB_VMENTRY:
	case TDB_MODE:
	case TDB_MARK:
		break;
	}
	return TDB_OK;
}

int machine_apply(struct machine *m)
{
	uint32_t index = (uint32_t)m->position;
	const struct tdb_event *e = &m->in->events[index];
	bool cpu_known = e->known & TDB_K_CPU;
	struct cpu *c;
	int status;

	m->position++;
	m->stats.events++;
	m->last_frame.entry = NONE;
	if (unlikely(e->kind < TDB_DELIVER || e->kind > TDB_MARK || (cpu_known ? e->cpu >= m->in->cpus : e->kind != TDB_GAP))) {
		m->stats.bad_events++;
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
	return status;
}
