/* pt.c - native events of the control-flow events in an Intel PT stream. */
#include <stdbool.h>
#include <string.h>

#include "pt.h"
#include "tdb.h"

/* What an event waits for: CFE binds to the FUP behind it if its IP bit is set; if it is not, to FUP and TIP while the
 * traced code is inside of the filters, and to nothing but a TIP elsewhere (libipt: struct pt_packet_cfe). */
struct out {
	struct pt_stream *s;
	const struct pt_text *text;
	struct tdb_event *event;
	uint64_t n;
};

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
static bool release(struct out *o)
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

static void emit_gap(struct out *o)
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
static void lose(struct out *o, enum pt_damage what)
{
	damaged(o->s, what);
	emit_gap(o);
	o->s->synced = 0;
	o->s->lost_at = o->s->offset;
}

/* RFLAGS.IF as MODE.Exec told it, at its address. */
static void emit_flags(struct out *o, bool at)
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

/* The address of a TIP or FUP; false: it has none. */
static bool last_ip(struct pt_stream *s, const struct pt_packet *p)
{
	static const uint8_t bits[8] = { 0, 16, 32, 48, 48, 0, 64, 0 };
	uint64_t mask;

	switch (p->aux) {
	case 0:
		return false;
	case 3:
		s->ip = (uint64_t)((int64_t)(p->value << 16) >> 16);
		s->ip_known = 1;
		return true;
	case 6:
		s->ip = p->value;
		s->ip_known = 1;
		return true;
	default:
		mask = ~0ull << bits[p->aux];
		s->ip = (s->ip & mask) | p->value;
		return true;
	}
}

static uint64_t scaled(uint64_t ticks, uint32_t n, uint32_t d)
{
	return ticks / d * n + ticks % d * n / d;
}

static void clock(struct pt_stream *s, const struct pt_packet *p)
{
	unsigned int bits;
	uint64_t now;

	switch (p->type) {
	case PT_TSC:
		s->tsc = p->value;
		s->tsc_known = 1;
		s->tma_known = 0;
		s->counts[PT_N_TSC]++;
		break;
	case PT_TMA:
		s->tma_known = s->tsc_known && s->ctc_n && s->ctc_d;
		s->tma_tsc = s->tsc - p->aux;   /* the fast counter: TSC ticks since the CTC's last one */
		s->tma_ctc = s->ctc = p->value;
		s->first_mtc = 1;
		break;
	case PT_MTC:
		if (!s->tma_known)
			break;
		/* TMA has 16 bits of the CTC: those of the MTC above them are not known before the first one. */
		bits = s->first_mtc && s->mtc_shift > 8 ? 16u - s->mtc_shift : 8;
		now = s->ctc >> s->mtc_shift;
		now = (now + ((p->value - (s->first_mtc ? now : s->mtc)) & ((1u << bits) - 1))) << s->mtc_shift;
		s->first_mtc = 0;
		s->mtc = (uint8_t)p->value;
		if (now > s->ctc)
			s->ctc = now;
		s->tsc = s->tma_tsc + scaled(s->ctc - s->tma_ctc, s->ctc_n, s->ctc_d);
		break;
	default:
		break;
	}
}

/* An event has happened: what waited for its branch does not get it any more. */
static bool hold(struct out *o, const struct pt_packet *p)
{
	struct pt_stream *s = o->s;
	bool bound = p->ip;

	if (!release(o))
		return false;
	if ((s->cr2_seen && p->aux != PT_INTR) || (s->vmx_seen && p->aux != PT_VMEXIT && p->aux != PT_VMEXIT_INTR)) {
		lose(o, PT_D_EVENT);
		return true;
	}
	s->counts[PT_N_CFE]++;
	s->events = 1;
	s->after_ovf = 0;
	s->held_type = (uint8_t)p->aux;
	s->held_vector = (uint8_t)p->value;
	s->held_at = s->offset;
	s->held_tsc = s->tsc;
	s->held_time = s->tsc_known;
	s->held_cr2 = s->cr2_seen;
	s->held_vmx = s->vmx_seen;
	s->held_data = s->cr2_seen ? s->cr2 : s->qualification;
	s->held_more = s->reason;
	s->cr2_seen = s->vmx_seen = 0;
	s->from_known = s->to_known = 0;
	s->if_known = 0;
	switch (p->aux) {
	case PT_INTR:
	case PT_SMI:
	case PT_INIT:
	case PT_VMEXIT:
	case PT_VMEXIT_INTR:
	case PT_UINTR:
	case PT_SWINTR:
		bound = bound || s->enabled;
		break;
	case PT_IRET:
	case PT_RSM:
	case PT_SIPI:
	case PT_VMENTRY:
	case PT_SHUTDOWN:
	case PT_UIRET:
	case PT_SYSCALL:
		break;
	default:
		s->counts[PT_N_UNKNOWN]++;
		break;
	}
	s->wait = bound ? PT_W_FUP : PT_W_TIP;
	return true;
}

/* What came before an event that it is about. */
static bool event_data(struct out *o, const struct pt_packet *p)
{
	struct pt_stream *s = o->s;
	uint8_t bit = p->aux == 2 ? 1 : 2;

	if (!release(o))
		return false;
	s->after_ovf = 0;
	if (p->aux > 2)         /* of a type not known yet */
		return true;
	if (s->cr2_seen || (p->aux == 0 ? s->vmx_seen : s->vmx_seen & bit)) {
		lose(o, PT_D_EVENT);
		return true;
	}
	if (p->aux == 0) {
		s->cr2_seen = 1;
		s->cr2 = p->value;
	} else {
		s->vmx_seen |= bit;
		*(p->aux == 1 ? &s->qualification : &s->reason) = p->value;
	}
	return true;
}

/* A packet between PSB and PSBEND: where things stand, no event. */
static bool status(struct out *o, const struct pt_packet *p)
{
	struct pt_stream *s = o->s;

	switch (p->type) {
	case PT_FUP:
		s->enabled = last_ip(s, p);
		return true;
	case PT_MODE_EXEC:
		s->if_known = 1;
		s->if_set = p->value >> 2 & 1;
		return true;
	case PT_MODE_TSX:
	case PT_PIP:
	case PT_VMCS:
	case PT_MNT:
		return true;
	case PT_PSBEND:
		s->in_psb = 0;
		return true;
	case PT_PAD:
	case PT_TSC:
	case PT_MTC:
	case PT_TMA:
	case PT_CYC:
	case PT_CBR:
	case PT_OVF:
		return false;
	default:
		lose(o, PT_D_STATUS);
		return p->type != PT_PSB;   /* a PSB without the end of the one before it: all is known again */
	}
}

/* One packet; false: a text is missing, nothing was done. */
static bool packet(struct out *o, const struct pt_packet *p)
{
	struct pt_stream *s = o->s;
	bool known;

	if (s->in_psb && status(o, p))
		return true;
	switch (p->type) {
	case PT_PAD:
	case PT_CYC:
	case PT_CBR:
		return true;
	case PT_TSC:
	case PT_MTC:
	case PT_TMA:
		clock(s, p);
		return true;
	case PT_PIP:
	case PT_VMCS:
	case PT_MNT:
		s->after_ovf = 0;
		return true;
	case PT_MODE_EXEC:
		s->mode = (uint8_t)(2 + (p->value >> 2 & 1));
		return true;
	case PT_FUP:
		if (s->wait == PT_W_TIP && !release(o))
			return false;
		known = last_ip(s, p) && s->ip_known;
		if (s->after_ovf) {
			s->enabled = 1;         /* where tracing goes on */
			s->after_ovf = 0;
			if (s->mode)
				emit_flags(o, known);
			return true;
		}
		if (s->wait == PT_W_FUP) {
			s->from = s->ip;
			s->from_known = known;
			s->wait = PT_W_TIP;
			if (s->mode) {          /* nothing comes between them that could wait for the branch */
				if (!release(o)) {
					s->wait = PT_W_FUP;
					return false;
				}
				s->events = 1;
				emit_flags(o, known);
			}
			return true;
		}
		if (s->mode) {
			s->events = 1;          /* nothing else tells a change of IF alone */
			emit_flags(o, known);
		}
		return true;
	case PT_TIP:
	case PT_TIP_PGE:
	case PT_TIP_PGD:
		known = last_ip(s, p) && s->ip_known;
		if (s->wait == PT_W_TIP && known && p->type != PT_TIP_PGD) {
			s->to = s->ip;
			s->to_known = 1;
		}
		if (!release(o)) {
			s->to_known = 0;
			return false;
		}
		if (s->mode)
			emit_flags(o, known && p->type != PT_TIP_PGD);
		s->after_ovf = 0;
		s->enabled = p->type != PT_TIP_PGD;
		s->counts[PT_N_PAUSE] += p->type == PT_TIP_PGD;
		return true;
	case PT_CFE:
		return hold(o, p);
	case PT_EVD:
		return event_data(o, p);
	case PT_PSB:
		if (!release(o))
			return false;
		if (s->cr2_seen || s->vmx_seen)
			lose(o, PT_D_EVENT);
		s->synced = 1;                  /* whatever was lost, here all is known again */
		s->mode = s->after_ovf = s->enabled = s->block = 0;
		s->ip = 0;
		s->ip_known = s->in_psb = 1;
		s->counts[PT_N_PSB]++;
		return true;
	case PT_OVF:
		if (!release(o))
			return false;
		s->counts[PT_N_OVF]++;
		emit_gap(o);
		s->after_ovf = 1;
		return true;
	case PT_STOP:
		if (!release(o))
			return false;
		s->counts[PT_N_STOP]++;
		known = s->ip_known;
		emit_gap(o);
		s->ip_known = known;
		return true;
	case PT_PSBEND:
		return true;
	default:                                /* TNT, TSX, PTW, power, blocks: nothing of ours, but no part of an event */
		if (s->wait == PT_W_TIP && !release(o))
			return false;
		s->after_ovf = 0;
		return true;
	}
}

/* First bytes of packets that need no thought while nothing waits for them: 1 a packet of one byte (PAD, short TNT, short
 * CYC), 2 TIP or FUP with an address. */
#define TIP4(i) [0x0d | (i) << 5] = 2, [0x1d | (i) << 5] = 2
#define TNT1(i) [(i)] = 1, [(i) + 2] = 1, [(i) + 4] = 1, [(i) + 6] = 1, [(i) + 8] = 1, [(i) + 10] = 1, [(i) + 12] = 1, \
		[(i) + 14] = 1, [(i) + 3] = 1, [(i) + 11] = 1
static const uint8_t quick[256] = {
	[0] = 1, [4] = 1, [6] = 1, [8] = 1, [10] = 1, [12] = 1, [14] = 1, [3] = 1, [11] = 1,
	TNT1(16), TNT1(32), TNT1(48), TNT1(64), TNT1(80), TNT1(96), TNT1(112), TNT1(128), TNT1(144), TNT1(160), TNT1(176),
	TNT1(192), TNT1(208), TNT1(224), TNT1(240), TIP4(1), TIP4(2), TIP4(3), TIP4(4), TIP4(6),
};
#undef TIP4
#undef TNT1

/* Packets from at on that only move the last address, and where they end.  There is one more packet behind them, or the end. */
static uint64_t skip_quick(struct pt_stream *s, const uint8_t *data, uint64_t at, uint64_t size)
{
	static const uint8_t bytes[8] = { 0, 2, 4, 6, 6, 0, 8, 0 };
	static const uint64_t taken[8] = { 0, 0xffff, 0xffffffff, ~0ull, 0xffffffffffff, 0, ~0ull, 0 };
	uint64_t packets = 0, ip = s->ip;
	uint8_t known = s->ip_known, tips = 0;

	for (; at + 9 <= size; packets++) {
		uint8_t first = data[at], how = first >> 5;
		uint64_t value;

		if (quick[first] == 1) {
			at++;
			continue;
		}
		if (!quick[first])
			break;
		memcpy(&value, data + at + 1, 8);
		if (how == 3)
			value = (uint64_t)((int64_t)(value << 16) >> 16);
		ip = (ip & ~taken[how]) | (value & taken[how]);
		known |= how == 3 || how == 6;
		tips |= !(first & 0x10);                /* TIP 0x0d, FUP 0x1d */
		at += 1 + (uint64_t)bytes[how];
	}
	s->ip = ip;
	s->ip_known = known;
	s->enabled |= tips;
	s->counts[PT_N_PACKETS] += packets;
	return at;
}

/* PAD and CYC. */
static uint64_t skip_cycles(struct pt_stream *s, const uint8_t *data, uint64_t at, uint64_t size)
{
	uint64_t begin = at;

	while (at < size && (!data[at] || (data[at] & 7) == 3))
		at++;
	s->counts[PT_N_PACKETS] += at - begin;
	return at;
}

int64_t pt_decode(struct pt_stream *s, const uint8_t *data, uint64_t size, uint64_t *at, int last, const struct pt_text *text,
		  void *ret, uint64_t cap)
{
	struct out o = { s, text, ret, 0 };
	uint64_t i;

	if (!s || !data || !at || *at > size || !text || !ret || cap < PT_ROOM || s->mtc_shift > 15)
		return DEC_E_ARG;
	s->mark = 0;
	i = *at;
	while (i < size && o.n + PT_ROOM <= cap) {
		struct pt_packet p;
		uint64_t next;
		int got;

		if (!s->synced) {
			uint64_t keep;

			next = pt_sync(data, size, s->looking || i < PT_HISTORY ? (s->looking ? i : 0) : i - (PT_HISTORY - 1),
				       last, &keep);
			s->looking = 1;
			s->synced = next != size;
			next = s->synced ? next : last ? size : keep;
			s->offset += next - i;
			i = next;
			if (!s->synced && !last)
				break;
			s->counts[PT_N_SKIPPED] += s->offset > s->lost_at ? s->offset - s->lost_at : 0;
			s->lost_at = s->offset;
			s->looking = 0;
			continue;
		}
		/* A FUP is no event's here, and a TIP no event: an event would wait. */
		if (!(s->wait | s->mode | s->in_psb | s->after_ovf | s->block))
			next = skip_quick(s, data, i, size);
		else
			next = skip_cycles(s, data, i, size);
		s->offset += next - i;
		i = next;
		if (i == size)
			break;
		got = pt_packet(data + i, size - i, s->block, &p);
		if (!got && !last)
			break;
		if (got <= 0) {
			if (!release(&o))
				break;
			lose(&o, got ? PT_D_PACKET : PT_D_CUT);
			continue;
		}
		if (!packet(&o, &p))
			break;
		s->counts[PT_N_PACKETS]++;
		if (!s->synced)
			continue;
		s->block = (uint8_t)pt_block(&p, s->block);
		s->offset += (uint64_t)got;
		i += (uint64_t)got;
	}
	if (last && i == size && !s->mark)
		release(&o);
	*at = i;
	return (int64_t)o.n;
}

int64_t pt_gap(struct pt_stream *s, int sync, const struct pt_text *text, void *ret, uint64_t cap)
{
	struct out o = { s, text, ret, 0 };

	if (!s || !text || !ret || cap < PT_ROOM)
		return DEC_E_ARG;
	s->mark = 0;
	if (!release(&o))
		return 0;
	emit_gap(&o);
	if (sync) {
		s->synced = 0;
		s->looking = 1;
		s->lost_at = s->offset;
	}
	return (int64_t)o.n;
}

int64_t pt_settle(struct pt_stream *s, uint64_t time, const struct pt_text *text, void *ret, uint64_t cap)
{
	struct out o = { s, text, ret, 0 };
	const uint64_t grace = 1 << 20;         /* TSC ticks; a branch takes its CPU some thousands */

	if (!s || !text || !ret || cap < PT_ROOM)
		return DEC_E_ARG;
	s->mark = 0;
	if (s->wait == PT_W_TIP && s->held_time && time >= grace && s->held_tsc <= time - grace)
		release(&o);
	return (int64_t)o.n;
}

uint64_t pt_waits(const struct pt_stream *s)
{
	return s && s->held_type && s->held_time ? s->held_tsc : UINT64_MAX;
}
