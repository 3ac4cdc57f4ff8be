/* pt_packet.c - the packets of Intel PT, and where they begin. */
#include <stdbool.h>
#include <string.h>

#include "pt.h"

enum {
	MAX_CYC = 10,   /* bytes: 68 bits of payload, as perf reads them */
	RUN = 64        /* bytes: of a PSB's pattern, more than any trace has */
};

static uint64_t load(const uint8_t *p, unsigned int bytes)
{
	uint64_t value = 0;

	for (unsigned int i = 0; i < bytes; i++)
		value |= (uint64_t)p[i] << 8 * i;
	return value;
}

/* A packet of a fixed size, whose payload are the bytes behind its opcode. */
static int plain(const uint8_t *data, uint64_t size, unsigned int opcode, unsigned int payload, struct pt_packet *ret)
{
	if (size < opcode + payload)
		return 0;
	ret->value = load(data + opcode, payload);
	return (int)(opcode + payload);
}

static int address(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	static const uint8_t bytes[8] = { 0, 2, 4, 6, 6, 0xff, 8, 0xff };
	unsigned int how = data[0] >> 5;

	if (bytes[how] == 0xff)
		return DEC_E_FORMAT;
	ret->aux = (uint16_t)how;
	return plain(data, size, 1, bytes[how], ret);
}

static int mode(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	if (size < 2)
		return 0;
	ret->value = data[1] & 0x1f;
	switch (data[1] >> 5) {
	case 0:
		ret->type = PT_MODE_EXEC;
		return (data[1] & 3) == 3 ? DEC_E_FORMAT : 2;   /* CS.L and CS.D are never both set */
	case 1:
		ret->type = PT_MODE_TSX;
		return (data[1] & 3) == 3 ? DEC_E_FORMAT : 2;   /* an abort ends the transaction */
	default:
		return DEC_E_FORMAT;
	}
}

static int trigger(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	unsigned int bytes;

	if (size < 2)
		return 0;
	bytes = data[1] & 0x40 ? 5 : 3;
	if (size < bytes)
		return 0;
	ret->type = PT_TRIG;
	ret->ip = data[1] >> 7;
	ret->aux = data[1];
	ret->value = load(data + 2, bytes - 2);
	return (int)bytes;
}

static int cycles(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	unsigned int at = 1, shift = 5;
	bool more = data[0] & 4;

	ret->type = PT_CYC;
	ret->value = data[0] >> 3;
	for (; more; shift += 7) {
		if (at == MAX_CYC)
			return DEC_E_FORMAT;
		if (at == size)
			return 0;
		ret->value |= (uint64_t)(data[at] >> 1) << shift;
		more = data[at++] & 1;
	}
	return (int)at;
}

/* Branches: the highest set bit ends them. */
static int taken(uint64_t bits, unsigned int bytes, struct pt_packet *ret)
{
	unsigned int count;

	if (!bits)
		return DEC_E_FORMAT;
	count = 63 - (unsigned int)__builtin_clzll(bits);
	if (!count)
		return DEC_E_FORMAT;
	ret->type = PT_TNT;
	ret->aux = (uint16_t)count;
	ret->value = bits & ~(1ull << count);
	return (int)bytes;
}

static int psb(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	for (uint64_t i = 0; i < 16 && i < size; i++)
		if (data[i] != (i & 1 ? 0x82 : 0x02))
			return DEC_E_FORMAT;
	ret->type = PT_PSB;
	return size < 16 ? 0 : 16;
}

static int clock_pair(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	if (size < 7)
		return 0;
	if (data[4] || data[6] & ~1)
		return DEC_E_FORMAT;
	ret->type = PT_TMA;
	ret->value = load(data + 2, 2);
	ret->aux = (uint16_t)load(data + 5, 2);
	return 7;
}

static int write_data(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	unsigned int how = data[1] >> 5 & 3;

	if (how > 1)
		return DEC_E_FORMAT;
	ret->type = PT_PTW;
	ret->ip = data[1] >> 7;
	return plain(data, size, 2, how ? 8 : 4, ret);
}

static int extended(const uint8_t *data, uint64_t size, struct pt_packet *ret)
{
	int got;

	if (size < 2)
		return 0;
	if ((data[1] & 0x1f) == 0x12)
		return write_data(data, size, ret);
	switch (data[1]) {
	case 0x03:
		ret->type = PT_CBR;
		return plain(data, size, 2, 2, ret);
	case 0x13:
		ret->type = PT_CFE;
		got = plain(data, size, 2, 2, ret);
		ret->ip = ret->value >> 7 & 1;
		ret->aux = ret->value & 0x1f;
		ret->value = ret->value >> 8;
		return got;
	case 0x22:
		ret->type = PT_PWRE;
		return plain(data, size, 2, 2, ret);
	case 0x23:
		ret->type = PT_PSBEND;
		return 2;
	case 0x33:
	case 0xb3:
		ret->type = PT_BEP;
		ret->ip = data[1] >> 7;
		return 2;
	case 0x43:
		ret->type = PT_PIP;
		return plain(data, size, 2, 6, ret);
	case 0x53:
		if (size < 11)
			return 0;
		ret->type = PT_EVD;
		ret->aux = data[2] & 0x3f;
		ret->value = load(data + 3, 8);
		return 11;
	case 0x62:
	case 0xe2:
		ret->type = PT_EXSTOP;
		ret->ip = data[1] >> 7;
		return 2;
	case 0x63:
		if (size < 3)
			return 0;
		ret->type = PT_BBP;
		ret->aux = data[2] >> 7;
		ret->value = data[2] & 0x1f;
		return 3;
	case 0x73:
		return clock_pair(data, size, ret);
	case 0x82:
		return psb(data, size, ret);
	case 0x83:
		ret->type = PT_STOP;
		return 2;
	case 0xa2:
		ret->type = PT_PWRX;
		return plain(data, size, 2, 5, ret);
	case 0xa3:
		got = plain(data, size, 2, 6, ret);
		return got > 0 ? taken(ret->value, 8, ret) : got;
	case 0xc2:
		ret->type = PT_MWAIT;
		return plain(data, size, 2, 8, ret);
	case 0xc3:
		ret->type = PT_MNT;
		if (size > 2 && data[2] != 0x88)
			return DEC_E_FORMAT;
		return plain(data, size, 3, 8, ret);
	case 0xc8:
		ret->type = PT_VMCS;
		return plain(data, size, 2, 5, ret);
	case 0xf3:
		ret->type = PT_OVF;
		return 2;
	default:
		return DEC_E_FORMAT;
	}
}

static int any(const uint8_t *data, uint64_t size, int block, struct pt_packet *ret)
{
	uint8_t first = data[0];

	if (block && (first & 7) == 4) {
		ret->type = PT_BIP;
		ret->aux = first >> 3;
		return plain(data, size, 1, (unsigned int)block, ret);
	}
	if (!first) {
		ret->type = PT_PAD;
		return 1;
	}
	if (first == 2)
		return extended(data, size, ret);
	if (!(first & 1))
		return taken(first >> 1, 1, ret);
	if (first & 2)
		return cycles(data, size, ret);
	switch (first & 0x1f) {
	case 0x01:
		ret->type = PT_TIP_PGD;
		return address(data, size, ret);
	case 0x0d:
		ret->type = PT_TIP;
		return address(data, size, ret);
	case 0x11:
		ret->type = PT_TIP_PGE;
		return address(data, size, ret);
	case 0x1d:
		ret->type = PT_FUP;
		return address(data, size, ret);
	default:
		break;
	}
	switch (first) {
	case 0x19:
		ret->type = PT_TSC;
		return plain(data, size, 1, 7, ret);
	case 0x59:
		ret->type = PT_MTC;
		return plain(data, size, 1, 1, ret);
	case 0x99:
		return mode(data, size, ret);
	case 0xd9:
		return trigger(data, size, ret);
	default:
		return DEC_E_FORMAT;
	}
}

int pt_block(const struct pt_packet *packet, int block)
{
	switch (packet->type) {
	case PT_BBP:
		return packet->aux ? 4 : 8;
	case PT_PAD:
	case PT_TSC:
	case PT_TMA:
	case PT_MTC:
	case PT_CYC:
	case PT_CBR:
	case PT_FUP:
	case PT_MNT:
	case PT_EXSTOP:
	case PT_PWRE:
	case PT_PWRX:
	case PT_BIP:
		return block;
	default:
		return 0;
	}
}

int pt_packet(const uint8_t *data, uint64_t size, int block, struct pt_packet *ret)
{
	int got;

	if (!data || !ret || (block != 0 && block != 4 && block != 8))
		return DEC_E_ARG;
	*ret = (struct pt_packet){ 0 };
	if (!size)
		return 0;
	got = any(data, size, block, ret);
	if (got > 0)
		ret->size = (uint8_t)got;
	return got;
}

uint64_t pt_sync(const uint8_t *data, uint64_t size, uint64_t from, int last, uint64_t *keep)
{
	static const uint8_t pattern[16] = { 2, 0x82, 2, 0x82, 2, 0x82, 2, 0x82, 2, 0x82, 2, 0x82, 2, 0x82, 2, 0x82 };
	uint64_t at = from, end;

	/* Every PSB holds such a word at each of its first 9 places, so every eighth byte is enough. */
	for (; at + 8 <= size; at += 8) {
		uint64_t begin = at;

		if (memcmp(data + at, pattern, 8) != 0 && memcmp(data + at, pattern + 1, 8) != 0)
			continue;
		if (data[at] != 2)
			begin++;
		while (begin >= from + 2 && data[begin - 2] == 2 && data[begin - 1] == 0x82)
			begin -= 2;
		for (end = begin; end + 2 <= size && end - begin < RUN && data[end] == 2 && data[end + 1] == 0x82; end += 2)
			;
		/* What comes before a PSB can end like one, what follows it cannot begin so: it is the end of a run.  A long run
		 * is no trace, and begins somewhere. */
		if (end - begin >= RUN)
			return begin;
		if (!last && end + 2 > size) {
			*keep = begin;
			return size;
		}
		if (end - begin >= 16)
			return end - 16;
	}
	*keep = size < from + 15 ? from : size - 15;
	return size;
}

int64_t pt_lex(const uint8_t *data, uint64_t size, uint64_t *at, int *block, struct pt_packet *ret, uint64_t cap)
{
	uint64_t n;

	if (!data || !at || !block || !ret || *at > size)
		return DEC_E_ARG;
	for (n = 0; n < cap; n++) {
		int got = pt_packet(data + *at, size - *at, *block, &ret[n]);

		if (got < 0)
			return n ? (int64_t)n : got;
		if (!got)
			break;
		ret[n].offset = *at;
		*at += (uint64_t)got;
		*block = pt_block(&ret[n], *block);
	}
	return (int64_t)n;
}
