/* pt_bind.c - which packets belong together: an event, the addresses and data that it has, addresses and times unpacked. */
#include "pt_internal.h"

/* What an event waits for: CFE binds to the FUP behind it if its IP bit is set; if it is not, to FUP and TIP while the
 * traced code is inside of the filters, and to nothing but a TIP elsewhere (libipt: struct pt_packet_cfe). */

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

	if (!pt_release(o))
		return false;
	if ((s->cr2_seen && p->aux != PT_INTR) || (s->vmx_seen && p->aux != PT_VMEXIT && p->aux != PT_VMEXIT_INTR)) {
		pt_lose(o, PT_D_EVENT);
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

	if (!pt_release(o))
		return false;
	s->after_ovf = 0;
	if (p->aux > 2)         /* of a type not known yet */
		return true;
	if (s->cr2_seen || (p->aux == 0 ? s->vmx_seen : s->vmx_seen & bit)) {
		pt_lose(o, PT_D_EVENT);
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
		pt_lose(o, PT_D_STATUS);
		return p->type != PT_PSB;   /* a PSB without the end of the one before it: all is known again */
	}
}

/* One packet; false: a text is missing, nothing was done. */
bool pt_take(struct out *o, const struct pt_packet *p)
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
		if (s->wait == PT_W_TIP && !pt_release(o))
			return false;
		known = last_ip(s, p) && s->ip_known;
		if (s->after_ovf) {
			s->enabled = 1;         /* where tracing goes on */
			s->after_ovf = 0;
			if (s->mode)
				pt_emit_flags(o, known);
			return true;
		}
		if (s->wait == PT_W_FUP) {
			s->from = s->ip;
			s->from_known = known;
			s->wait = PT_W_TIP;
			if (s->mode) {          /* nothing comes between them that could wait for the branch */
				if (!pt_release(o)) {
					s->wait = PT_W_FUP;
					return false;
				}
				s->events = 1;
				pt_emit_flags(o, known);
			}
			return true;
		}
		if (s->mode) {
			s->events = 1;          /* nothing else tells a change of IF alone */
			pt_emit_flags(o, known);
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
		if (!pt_release(o)) {
			s->to_known = 0;
			return false;
		}
		if (s->mode)
			pt_emit_flags(o, known && p->type != PT_TIP_PGD);
		s->after_ovf = 0;
		s->enabled = p->type != PT_TIP_PGD;
		s->counts[PT_N_PAUSE] += p->type == PT_TIP_PGD;
		return true;
	case PT_CFE:
		return hold(o, p);
	case PT_EVD:
		return event_data(o, p);
	case PT_PSB:
		if (!pt_release(o))
			return false;
		if (s->cr2_seen || s->vmx_seen)
			pt_lose(o, PT_D_EVENT);
		s->synced = 1;                  /* whatever was lost, here all is known again */
		s->mode = s->after_ovf = s->enabled = s->block = 0;
		s->ip = 0;
		s->ip_known = s->in_psb = 1;
		s->counts[PT_N_PSB]++;
		return true;
	case PT_OVF:
		if (!pt_release(o))
			return false;
		s->counts[PT_N_OVF]++;
		pt_emit_gap(o);
		s->after_ovf = 1;
		return true;
	case PT_STOP:
		if (!pt_release(o))
			return false;
		s->counts[PT_N_STOP]++;
		known = s->ip_known;
		pt_emit_gap(o);
		s->ip_known = known;
		return true;
	case PT_PSBEND:
		return true;
	default:                                /* TNT, TSX, PTW, power, blocks: nothing of ours, but no part of an event */
		if (s->wait == PT_W_TIP && !pt_release(o))
			return false;
		s->after_ovf = 0;
		return true;
	}
}

