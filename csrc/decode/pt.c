/* pt.c - goes through the bytes of an Intel PT stream: where packets begin, which need no thought, where to go on after damage. */
#include <string.h>

#include "pt_internal.h"

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
			if (!pt_release(&o))
				break;
			pt_lose(&o, got ? PT_D_PACKET : PT_D_CUT);
			continue;
		}
		if (!pt_take(&o, &p))
			break;
		s->counts[PT_N_PACKETS]++;
		if (!s->synced)
			continue;
		s->block = (uint8_t)pt_block(&p, s->block);
		s->offset += (uint64_t)got;
		i += (uint64_t)got;
	}
	if (last && i == size && !s->mark)
		pt_release(&o);
	*at = i;
	return (int64_t)o.n;
}

int64_t pt_gap(struct pt_stream *s, int sync, const struct pt_text *text, void *ret, uint64_t cap)
{
	struct out o = { s, text, ret, 0 };

	if (!s || !text || !ret || cap < PT_ROOM)
		return DEC_E_ARG;
	s->mark = 0;
	if (!pt_release(&o))
		return 0;
	pt_emit_gap(&o);
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
		pt_release(&o);
	return (int64_t)o.n;
}

uint64_t pt_waits(const struct pt_stream *s)
{
	return s && s->held_type && s->held_time ? s->held_tsc : UINT64_MAX;
}
