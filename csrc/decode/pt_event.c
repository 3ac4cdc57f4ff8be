/* pt_event.c - native events of control-flow events, once they are complete. */
#include "pt_internal.h"

static struct tdb_event *emit(struct out *o, enum tdb_kind kind, uint64_t time, bool time_known)
{
	struct tdb_event *e = &o->event[o->n++];

	*e = (struct tdb_event){ .kind = (uint8_t)kind, .cpu = o->s->cpu, .known = TDB_K_CPU };
	if (time_known) {
		e->time = time;
		e->known |= TDB_K_TIME;
	}
	return e;
}

static struct tdb_event *emit_now(struct out *o, enum tdb_kind kind)
{
	return emit(o, kind, o->s->tsc, o->s->tsc_known);
}

static void set(struct tdb_event *e, uint64_t *field, uint64_t value, enum tdb_known bit)
{
	*field = value;
	e->known |= (uint16_t)bit;
}

/* The text of the held event's mark: -1 none. */
static int mark_of(const struct pt_stream *s)
{
	switch (s->held_type) {
	case PT_VMEXIT_INTR:
		return PT_M_EXIT + s->held_vector;
	case PT_SIPI:
		return PT_M_SIPI + s->held_vector;
	case PT_UINTR:
		return PT_M_UINTR + s->held_vector;
	case PT_UIRET:
		return PT_M_UIRET;
	case PT_INTR:
	case PT_IRET:
	case PT_SMI:
	case PT_RSM:
	case PT_INIT:
	case PT_VMENTRY:
	case PT_VMEXIT:
	case PT_SHUTDOWN:
	case PT_SWINTR:
	case PT_SYSCALL:
		return -1;
	default:
		return PT_M_UNKNOWN + (s->held_type & 31);
	}
}

static const uint8_t kind_of[16] = {
	[PT_INTR] = TDB_DELIVER, [PT_IRET] = TDB_RETURN, [PT_SMI] = TDB_SMI, [PT_RSM] = TDB_RSM, [PT_INIT] = TDB_INIT,
	[PT_VMENTRY] = TDB_VMENTRY, [PT_VMEXIT] = TDB_VMEXIT, [PT_VMEXIT_INTR] = TDB_VMEXIT, [PT_SHUTDOWN] = TDB_SHUTDOWN,
	[PT_SWINTR] = TDB_DELIVER, [PT_SYSCALL] = TDB_DELIVER,
};

static void emit_deliver(struct tdb_event *e, const struct pt_stream *s)
{
	if (s->held_type != PT_SYSCALL) {   /* SYSCALL or SYSENTER: not told */
		e->arg = s->held_vector;
		e->known |= TDB_K_ARG;
	}
	if (s->held_type == PT_INTR) {      /* a device, NMI, exception or INT n; EVD goes with page faults alone */
		if (!s->held_cr2 || s->held_vector != 14)
			return;
		set(e, &e->value, s->held_data, TDB_K_VALUE);
		e->source = TDB_SRC_EXCEPTION;
	} else {
		e->source = s->held_type == PT_SWINTR ? TDB_SRC_SOFT_INT : TDB_SRC_SYSCALL;
	}
	e->known |= TDB_K_SOURCE;
}

/* The FUP of a VM exit is the guest's RIP, its TIP the host's. */
static void emit_exit(struct tdb_event *e, const struct pt_stream *s)
{
	e->known |= TDB_K_ARG;              /* VMX */
	if (s->from_known)
		set(e, &e->addr, s->from, TDB_K_ADDR);
	if (s->to_known)
		set(e, &e->rip, s->to, TDB_K_RIP);
	if (s->held_vmx & 2)
		set(e, &e->value, s->held_data, TDB_K_VALUE);
	if (!(s->held_vmx & 1))
		return;
	e->code = (uint32_t)s->held_more;
	e->known |= TDB_K_CODE;
	/* Reason 0 is "exception or NMI": no exception has vector 2, and INT 2 does not exit so (SDM 25.2, 26.9.2). */
	if (s->held_type == PT_VMEXIT_INTR && s->held_more == 0 && s->held_vector == 2) {
		e->source = TDB_SRC_NMI;
		e->known |= TDB_K_SOURCE;
	}
}

/* Write the held event; false: its text is missing, nothing was written. */
bool pt_release(struct out *o)
{
	struct pt_stream *s = o->s;
	int mark = mark_of(s);
	struct tdb_event *e;

	if (!s->held_type)
		return true;
	if (mark >= 0 && !o->text[mark].size) {
		s->mark = (uint32_t)mark + 1;
		return false;
	}
	if (s->held_type < 16 && kind_of[s->held_type]) {
		e = emit(o, kind_of[s->held_type], s->held_tsc, s->held_time);
		if (s->held_at <= UINT32_MAX) {
			e->source_index = (uint32_t)s->held_at;
			e->known |= TDB_K_SOURCE_INDEX;
		}
		if (e->kind == TDB_VMEXIT) {
			emit_exit(e, s);
		} else {
			if (s->from_known)
				set(e, &e->rip, s->from, TDB_K_RIP);
			if ((e->kind == TDB_RETURN || e->kind == TDB_VMENTRY) && s->to_known)
				set(e, &e->addr, s->to, TDB_K_ADDR);
			if (e->kind == TDB_INIT) {
				e->arg = 1;
				e->known |= TDB_K_ARG;
			}
			if (e->kind == TDB_DELIVER) {
				emit_deliver(e, s);
				if (s->to_known) {
					e = emit(o, TDB_ENTER, s->held_tsc, s->held_time);
					set(e, &e->rip, s->to, TDB_K_RIP);
				}
			}
		}
	}
	if (mark >= 0) {
		e = emit(o, TDB_MARK, s->held_tsc, s->held_time);
		if (s->from_known && s->held_type != PT_VMEXIT_INTR)
			set(e, &e->rip, s->from, TDB_K_RIP);
		set(e, &e->value, o->text[mark].at, TDB_K_VALUE);
		e->code = o->text[mark].size;
		e->known |= TDB_K_CODE;
		e->flags = TDB_F_BYTES;
	}
	if (s->wait == PT_W_FUP)
		s->counts[PT_N_ORPHAN]++;
	s->held_type = 0;
	s->wait = PT_W_NONE;
	s->from_known = s->to_known = 0;
	return true;
}

void pt_emit_gap(struct out *o)
{
	struct pt_stream *s = o->s;

	emit_now(o, TDB_GAP);
	s->if_known = s->mode = s->enabled = s->after_ovf = s->ip_known = s->block = s->in_psb = 0;
	s->cr2_seen = s->vmx_seen = 0;
}

static void damaged(struct pt_stream *s, enum pt_damage what)
{
	uint64_t n = s->counts[PT_N_DAMAGE]++;

	if (n < PT_DAMAGES) {
		s->damage[n] = (uint8_t)what;
		s->damage_at[n] = s->offset;
	}
}

/* Go on at the next PSB. */
void pt_lose(struct out *o, enum pt_damage what)
{
	damaged(o->s, what);
	pt_emit_gap(o);
	o->s->synced = 0;
	o->s->lost_at = o->s->offset;
}

/* RFLAGS.IF as MODE.Exec told it, at its address. */
void pt_emit_flags(struct out *o, bool at)
{
	struct pt_stream *s = o->s;
	bool same = s->if_known && s->if_set == (s->mode & 1);
	struct tdb_event *e;

	s->if_known = 1;
	s->if_set = s->mode & 1;
	s->mode = 0;
	if (!s->events || same)
		return;
	s->counts[PT_N_IF]++;
	e = emit_now(o, TDB_FLAGS);
	e->arg = s->if_set;
	e->known |= TDB_K_ARG;
	if (at && s->ip_known)
		set(e, &e->rip, s->ip, TDB_K_RIP);
}

