/*
 * ftrace_record.c - a record of a tracepoint into native events.
 */
#include "ftrace_private.h"

enum {
	FLAG_HARDIRQ = 0x08, FLAG_SOFTIRQ = 0x10, FLAG_NMI = 0x40,   /* common_flags: enum trace_flag_type */
	DM_LOWEST = 1, DM_NMI = 4,       /* delivery modes of a LAPIC */
	VMX_EXCEPTION_NMI = 0, SVM_NMI = 0x61,
	ISA_VMX = 1, ISA_SVM = 2,
	INTR_EXT = 0, INTR_NMI = 2, INTR_HARD = 3, INTR_SOFT_INT = 4, INTR_PRIV = 5, INTR_SOFT_EXC = 6,
	VECTOR_NMI = 2, VECTOR_MC = 18
};

#define VALID 0x80000000U                /* of an interruption information (SDM Vol. 3C 25.8.3), and of SVM's EVENTINJ */
#define HAS_CODE 0x800U

/* A field of a record; 0 if the record is too short for it or has none. */
static int field(const struct ftr_field *f, const uint8_t *p, uint32_t size, uint64_t *ret)
{
	uint16_t half;

	if ((uint32_t)f->at + f->size > size)
		return 0;
	p += f->at;
	switch (f->size) {
	case 1: *ret = *p; return 1;
	case 2:
		memcpy(&half, p, sizeof(half));
		*ret = half;
		return 1;
	case 4: *ret = get32(p); return 1;
	case 8: *ret = get64(p); return 1;
	default: return 0;
	}
}

static struct tdb_event event(const struct ftr_stream *st, uint8_t kind, uint32_t cpu, uint16_t known)
{
	struct tdb_event e = {0};

	e.time = st->time;
	e.kind = kind;
	e.cpu = (uint16_t)cpu;
	e.known = known | TDB_K_TIME | TDB_K_CPU;
	return e;
}

static struct tdb_event from(const struct ftr_stream *st, const uint64_t *table, uint32_t cpu)
{
	struct tdb_event e;

	memcpy(&e, table, sizeof(e));
	e.time = st->time;
	e.cpu = (uint16_t)cpu;
	e.known |= TDB_K_TIME | TDB_K_CPU;
	return e;
}

static void push(struct ftr_stream *st, const struct tdb_event *e)
{
	memcpy(st->queue[(st->head + st->queued++) % FTR_QUEUE], e, sizeof(*e));
}

void ftr_release(struct ftr_state *s, struct ftr_stream *st)
{
	if (st->held != FTR_NONE)
		s->count[FTR_C_UNSETTLED]++;
	st->held = FTR_NONE;
}

void ftr_gap(struct ftr_state *s, struct ftr_stream *st, uint64_t lost)
{
	struct tdb_event e = event(st, TDB_GAP, st->cpu, 0);

	ftr_release(s, st);
	if (s->vcpus)
		e.known &= (uint16_t)~TDB_K_CPU, e.cpu = 0;
	if (!st->time)
		e.known &= (uint16_t)~TDB_K_TIME;
	if (lost < UINT32_MAX) {
		e.value = lost;
		e.known |= TDB_K_VALUE;
		s->count[FTR_C_LOST] += lost;
	}
	push(st, &e);
	s->count[FTR_C_GAPS]++;
	st->irq = st->exited = FTR_NONE;
	st->in_nmi = st->gif_clear = 0;
}

/* The native CPU of a thread's vCPU; FTR_NONE: not known, or one too many.  `add`: it is one. */
static uint32_t vcpu_of(struct ftr_state *s, uint32_t pid, uint32_t id, int add)
{
	uint32_t slots = sizeof(s->slot) / sizeof(s->slot[0]);
	uint32_t i = pid * 2654435761U % slots, n = 0;

	if (pid == FTR_NONE)
		return FTR_NONE;
	/* There are at most half as many vCPUs as slots. */
	while (s->slot[i]) {
		n = s->slot[i] - 1U;
		if (s->vcpu[n].pid == pid)
			break;
		i = (i + 1) % slots;
	}
	if (s->slot[i] && (id == FTR_NONE || s->vcpu[n].id == FTR_NONE || s->vcpu[n].id == id)) {
		if (id != FTR_NONE)
			s->vcpu[n].id = id;
		return s->first_vcpu + n;
	}
	if (!add || s->first_vcpu + s->vcpus >= FTR_MAX_CPUS)
		return FTR_NONE;
	/* A thread number that was used again stands for its newest vCPU. */
	s->vcpu[s->vcpus] = (struct ftr_vcpu){ .pid = pid, .id = id };
	s->slot[i] = (uint16_t)++s->vcpus;
	return s->first_vcpu + s->vcpus - 1;
}

/* -- what the records become ---------------------------------------------------------------------------------------------- */

static int put(struct tdb_event *e, const struct ftr_field *f, const uint8_t *p, uint32_t size)
{
	uint64_t v;

	if (!field(f, p, size, &v))
		return -1;
	switch (f->to) {
	case FTR_TO_RIP: e->rip = v; e->known |= TDB_K_RIP; break;
	case FTR_TO_RSP: e->rsp = v; e->known |= TDB_K_RSP; break;
	case FTR_TO_ADDR: e->addr = v; e->known |= TDB_K_ADDR; break;
	case FTR_TO_VALUE: e->value = v; e->known |= TDB_K_VALUE; break;
	case FTR_TO_CODE: e->code = (uint32_t)v; e->known |= TDB_K_CODE; break;
	case FTR_TO_ARG:
		if (v > 0xff)
			return -1;
		e->arg = (uint8_t)v;
		e->known |= TDB_K_ARG;
		break;
	default:
		break;
	}
	return 0;
}

static void keep_code(struct ftr_state *s, uint64_t rip)
{
	uint32_t slots = sizeof(s->code) / sizeof(s->code[0]);
	uint32_t i = (uint32_t)((rip * 0x9e3779b97f4a7c15ULL) >> 52) % slots;

	while (s->code[i] && s->code[i] != rip)
		i = (i + 1) % slots;
	if (!s->code[i] && s->codes < slots / 2) {
		s->code[i] = rip;
		s->codes++;
	}
}

static void emit(struct ftr_state *s, struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size,
		 uint8_t flags)
{
	struct tdb_event e = from(st, pt->event, st->cpu), note;
	uint32_t i;
	int odd = 0;

	for (i = 0; i < FTR_FIELDS && pt->field[i].size; i++)
		if (pt->field[i].to != FTR_TO_NOTHING)
			odd |= put(&e, &pt->field[i], p, size);
	if (odd) {
		s->count[FTR_C_ODD]++;
		e.flags |= TDB_F_PARTIAL;
	}
	if (e.kind == TDB_DELIVER && st->gif_clear) {   /* KVM executes STGI before it records the exit */
		note = event(st, TDB_UNBLOCK, st->cpu, TDB_K_ARG);
		note.arg = 1;
		push(st, &note);
		st->gif_clear = 0;
	}
	if (e.kind == TDB_DELIVER && flags & FLAG_NMI && !st->in_nmi) {
		note = from(st, s->note, st->cpu);
		if (note.kind)
			push(st, &note);
		st->in_nmi = 1;
	}
	push(st, &e);
	if (e.known & TDB_K_RIP && e.rip >> 63)
		keep_code(s, e.rip);
}

/* An event that the caller completes, if it has not done so for one like it. */
static int ask(struct ftr_state *s, struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size)
{
	struct tdb_event e = from(st, pt->event, st->cpu);
	struct ftr_answer a = { .point = (uint32_t)(pt - s->point) };
	struct ftr_answer *known;
	int keyed = field(&pt->field[0], p, size, &a.key[0]) && (!pt->field[1].size || field(&pt->field[1], p, size, &a.key[1]));

	if (keyed) {
		known = &s->answer[ftr_answer_slot(&a)];
		if (known->point == a.point && known->key[0] == a.key[0] && known->key[1] == a.key[1]) {
			ftr_complete(&e, known->value, known->code);
			push(st, &e);
			return 0;
		}
	} else {
		a.point = 0;
	}
	push(st, &e);
	s->asked = a;
	s->point_asked = (uint32_t)(pt - s->point);
	s->record = p;
	s->record_size = size;
	return 1;
}

/* An interrupt runs each of its handlers once; one record a handler. */
static void irq_entry(struct ftr_state *s, struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size,
		      uint8_t flags)
{
	uint64_t irq, place;
	uint32_t at, length, hash = 2166136261U;

	if (!field(&pt->field[0], p, size, &irq)) {
		s->count[FTR_C_ODD]++;
		return;
	}
	if (field(&pt->field[1], p, size, &place)) {
		at = place & 0xffff;
		length = place >> 16 & 0xffff;
		while (at < size && length-- && p[at])
			hash = (hash ^ p[at++]) * 16777619U;
	}
	for (at = 0; at < st->handlers && st->handler[at] != hash; at++)
		;
	if (st->handled == st->records - 1 && st->exited == (uint32_t)irq && st->irq == (uint32_t)irq && at == st->handlers &&
	    at < FTR_HANDLERS) {
		st->handler[st->handlers++] = hash;
		s->count[FTR_C_SHARED]++;
		return;
	}
	st->irq = (uint32_t)irq;
	st->handler[0] = hash;
	st->handlers = 1;
	emit(s, st, pt, p, size, flags);
}

static void irq_exit(struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size)
{
	uint64_t irq;

	st->exited = field(&pt->field[0], p, size, &irq) ? (uint32_t)irq : FTR_NONE;
	st->handled = st->records;
}

static uint32_t pid_of(const struct ftr_state *s, const uint8_t *p, uint32_t size)
{
	uint64_t pid = FTR_NONE;

	return field(&s->pid, p, size, &pid) ? (uint32_t)pid : FTR_NONE;
}

/* What an interruption information injects; 0: nothing. */
static int injected(uint32_t info, struct tdb_event *e)
{
	e->arg = info & 0xff;
	switch (info >> 8 & 7) {
	case INTR_EXT: e->source = TDB_SRC_INJECTED; break;
	case INTR_NMI: e->source = TDB_SRC_NMI; break;
	case INTR_HARD: e->source = e->arg == VECTOR_MC ? TDB_SRC_MC : TDB_SRC_EXCEPTION; break;
	case INTR_SOFT_INT:
	case INTR_PRIV:
	case INTR_SOFT_EXC: e->source = TDB_SRC_SOFT_INT; break;
	default: return 0;
	}
	e->known |= TDB_K_ARG | TDB_K_SOURCE;
	return (info & VALID) != 0;
}

static void kvm_entry(struct ftr_state *s, struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size)
{
	uint64_t id = FTR_NONE, rip, info, code;
	struct tdb_event e = event(st, TDB_VMENTRY, st->cpu, 0);
	uint32_t vcpu;

	ftr_release(s, st);
	st->gif_clear = 0;
	field(&pt->field[FTR_N_VCPU], p, size, &id);
	vcpu = vcpu_of(s, pid_of(s, p, size), (uint32_t)id, 1);
	push(st, &e);
	e = event(st, TDB_DELIVER, vcpu, 0);
	if (!field(&pt->field[FTR_N_INTR], p, size, &info) || !injected((uint32_t)info, &e))
		return;
	if (vcpu == FTR_NONE) {
		s->count[FTR_C_NO_VCPU]++;
		return;
	}
	if (field(&pt->field[FTR_N_RIP], p, size, &rip))
		e.rip = rip, e.known |= TDB_K_RIP;
	if (e.source == TDB_SRC_EXCEPTION && info & HAS_CODE && field(&pt->field[FTR_N_CODE], p, size, &code))
		e.code = (uint32_t)code, e.known |= TDB_K_CODE;
	/* Whether it was delivered is known at the VM exit that comes next on this CPU. */
	st->held = (st->head + st->queued) % FTR_QUEUE;
	push(st, &e);
}

static void kvm_exit(struct ftr_state *s, struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size)
{
	uint64_t reason = 0, rip, isa = 0, info2 = 0, intr = 0;
	struct tdb_event e = event(st, TDB_VMEXIT, st->cpu, TDB_K_CODE), held, was = {0};
	uint32_t info;
	int failed;

	if (!field(&pt->field[FTR_X_REASON], p, size, &reason)) {
		s->count[FTR_C_ODD]++;
		return;
	}
	field(&pt->field[FTR_X_ISA], p, size, &isa);
	field(&pt->field[FTR_X_INFO2], p, size, &info2);
	if (!field(&pt->field[FTR_X_INTR], p, size, &intr) && isa == ISA_VMX) {
		intr = info2;   /* before Linux 5.10 */
		info2 = 0;
	}
	/* VMX: IDT-vectoring information (SDM Vol. 3C 25.9.3), or no entry at all (bit 31 of the reason).  SVM: EXITINTINFO. */
	info = (uint32_t)(isa == ISA_SVM ? intr : isa == ISA_VMX ? info2 : 0);
	failed = isa == ISA_VMX && reason & VALID;
	if (st->held != FTR_NONE) {
		memcpy(&held, st->queue[st->held], sizeof(held));
		if (failed || (injected(info, &was) && was.source == held.source && was.arg == held.arg)) {
			held.flags |= TDB_F_FAILED;
			memcpy(st->queue[st->held], &held, sizeof(held));
			s->count[FTR_C_UNDELIVERED]++;
		}
		st->held = FTR_NONE;
	}
	e.code = (uint32_t)reason;
	if (isa == ISA_VMX || isa == ISA_SVM)
		e.arg = isa == ISA_SVM, e.known |= TDB_K_ARG;
	st->gif_clear = isa == ISA_SVM;
	if (field(&pt->field[FTR_X_RIP], p, size, &rip))
		e.addr = rip, e.known |= TDB_K_ADDR;
	if ((isa == ISA_VMX && (uint16_t)reason == VMX_EXCEPTION_NMI && !failed && intr & VALID && (intr >> 8 & 7) == INTR_NMI) ||
	    (isa == ISA_SVM && reason == SVM_NMI))
		e.source = TDB_SRC_NMI, e.known |= TDB_K_SOURCE;
	push(st, &e);
	/* An NMI-window exit shows that an IRET came, not whose: as the end of blocking alone it would make the frame of the last
	   NMI look abandoned. */
}

static void request(struct ftr_state *s, struct ftr_stream *st, const uint64_t *table, uint32_t cpu, uint64_t vector,
		    int64_t code)
{
	struct tdb_event e = from(st, table, cpu);

	if (vector > 0xff || cpu == FTR_NONE) {
		s->count[cpu == FTR_NONE ? FTR_C_NO_VCPU : FTR_C_ODD]++;
		return;
	}
	e.arg = (uint8_t)vector;
	e.known |= TDB_K_ARG;
	if (code >= 0)
		e.code = (uint32_t)code, e.known |= TDB_K_CODE;
	push(st, &e);
}

static void kvm_request(struct ftr_state *s, struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size)
{
	uint64_t vector = 0x100, has = 0, code = 0;
	int coded;

	field(&pt->field[0], p, size, &vector);
	coded = field(&pt->field[1], p, size, &has) && has && field(&pt->field[2], p, size, &code);
	request(s, st, pt->event, vcpu_of(s, pid_of(s, p, size), FTR_NONE, 1), vector, coded ? (int64_t)(uint32_t)code : -1);
}

/* An interrupt that a virtual LAPIC accepted.  The record names the vCPU, not the VM: only in the thread of this vCPU, and
 * not in an interrupt on top of it, is it known whose it is. */
static void kvm_accept(struct ftr_state *s, struct ftr_stream *st, const struct ftr_point *pt, const uint8_t *p, uint32_t size,
		       uint8_t flags)
{
	uint64_t id, mode, vector = 0x100;
	uint32_t cpu = FTR_NONE;

	if (!field(&pt->field[0], p, size, &id) || !field(&pt->field[1], p, size, &mode)) {
		s->count[FTR_C_ODD]++;
		return;
	}
	field(&pt->field[2], p, size, &vector);
	mode = mode >> 8 & 7;   /* as the ICR has it */
	if (mode > DM_LOWEST && mode != DM_NMI)
		return;
	if (!(flags & (FLAG_HARDIRQ | FLAG_SOFTIRQ | FLAG_NMI)))
		cpu = vcpu_of(s, pid_of(s, p, size), FTR_NONE, 0);
	if (cpu != FTR_NONE && s->vcpu[cpu - s->first_vcpu].id != (uint32_t)id)
		cpu = FTR_NONE;
	request(s, st, pt->event, cpu, mode == DM_NMI ? VECTOR_NMI : vector, -1);
}

int ftr_record(struct ftr_state *s, struct ftr_stream *st, const uint8_t *p, uint32_t size)
{
	uint64_t type, flags = 0;
	struct ftr_point *pt;
	uint32_t number = 0;

	st->records++;
	s->count[FTR_C_RECORDS]++;
	if (field(&s->type, p, size, &type) && type < FTR_MAX_POINTS)
		number = s->number[type];
	pt = &s->point[number < s->points ? number : 0];
	pt->count++;
	field(&s->flags, p, size, &flags);
	if (!(flags & FLAG_NMI))
		st->in_nmi = 0;
	if (pt == s->point)
		s->count[FTR_C_UNKNOWN]++;
	switch (pt->what) {
	case FTR_EVENT: emit(s, st, pt, p, size, (uint8_t)flags); break;
	case FTR_ASK: return ask(s, st, pt, p, size);
	case FTR_IRQ_ENTRY: irq_entry(s, st, pt, p, size, (uint8_t)flags); break;
	case FTR_IRQ_EXIT: irq_exit(st, pt, p, size); break;
	case FTR_KVM_ENTRY: kvm_entry(s, st, pt, p, size); break;
	case FTR_KVM_EXIT: kvm_exit(s, st, pt, p, size); break;
	case FTR_KVM_REQUEST: kvm_request(s, st, pt, p, size); break;
	case FTR_KVM_ACCEPT: kvm_accept(s, st, pt, p, size, (uint8_t)flags); break;
	default: break;
	}
	return 0;
}
