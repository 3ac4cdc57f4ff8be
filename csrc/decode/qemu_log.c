/* qemu_log.c - see qemu_log.h: the events of blocks. */
#include "qemu_log.h"

#include <string.h>

#include "decode.h"
#include "qemu_block.h"
#include "tdb.h"

enum { LMA = 1 << 10 }; /* of EFER */

uint32_t qlog_slot(uint64_t tr, uint64_t idt)
{
	uint64_t h = (tr ^ (idt << 17 | idt >> 47)) * UINT64_C(0x9e3779b97f4a7c15);

	return (uint32_t)(h >> 54) % QLOG_TABLES;
}

static uint8_t source_of(const struct qlog *q, const struct block *b)
{
	if (b->soft)
		return TDB_SRC_SOFT_INT;
	if (b->served >= 0)
		return q->served[b->vector];
	if (b->vector == 2)
		return TDB_SRC_NMI;
	if (b->vector == 18)
		return TDB_SRC_MC;
	return b->vector < 32 ? TDB_SRC_EXCEPTION : TDB_SRC_EXTERNAL;
}

/* Not even with 57-bit linear addresses. */
static bool never_canonical(uint64_t addr)
{
	return addr >= UINT64_C(1) << 56 && addr < UINT64_MAX - (UINT64_C(1) << 56) + 1;
}

/*
 * Whether the event before on this CPU surely did not fail with this exception at the same place; see Failures.failed() of
 * formats/qemu/failed.py, which decides the rest.
 */
static bool is_no_failure(const struct qlog *q, const struct qlog_tables *t, const struct qlog_cpu *cpu, const struct block *b)
{
	enum { FETCH_OR_USER = 0x14, STORE = 2, FRAME = 48, DESCRIPTOR_FIRST = 10, DESCRIPTOR_LAST = 13 };

	if (cpu->attempt == 0 || cpu->ip != b->ip || cpu->sp != b->sp)
		return true;
	if (cpu->attempt != 1)
		return false;
	if (cpu->cs != b->cs || cpu->rflags != b->rflags)
		return true;
	if ((b->old >= 0 && b->old != UINT32_MAX) || b->vector == 8)
		return false;
	/* Without an error code a delivery raises them for a stack that is not canonical. */
	if (b->vector >= DESCRIPTOR_FIRST && b->vector <= DESCRIPTOR_LAST)
		return b->code == 0 && !cpu->soft && !t->odd_top && !never_canonical((cpu->sp & ~UINT64_C(15)) - 1);
	if (b->vector != 14 || (b->code & FETCH_OR_USER))
		return true;
	if ((cpu->cs & 3) == 3 || b->cr2 - cpu->idt < 4096 || b->cr2 - cpu->tr < q->tss_bytes)
		return false;
	if (!(b->code & STORE))
		return true;
	/* The store of a delivery goes below the stack's top: that of the gate's IST, or RSP. */
	if (cpu->soft || t->tops > QLOG_TOPS || (cpu->sp & ~UINT64_C(15)) - 1 - b->cr2 < FRAME)
		return false;
	for (unsigned i = 0; i < t->tops; i++)
		if (t->top[i] - 1 - b->cr2 < FRAME)
			return false;
	return true;
}

/* The event of a block; false: more has to be known for it. */
static bool make_event(struct qlog *q, const struct block *b, struct tdb_event *e, uint32_t index)
{
	struct qlog_tables *t = &q->tables[qlog_slot(b->tr, b->idt)];

	if (b->number != (uint64_t)q->expected || t->digits != b->digits || t->tr != b->tr || t->idt != b->idt ||
	    t->cpu >= QLOG_CPUS)
		return false;
	struct qlog_cpu *cpu = &q->cpu[t->cpu];
	if (!cpu->ready || cpu->tr != t->tr_base || cpu->idt != t->idt_base)
		return false;
	uint8_t source = source_of(q, b);
	if (source == TDB_SRC_EXCEPTION && !is_no_failure(q, t, cpu, b))
		return false;

	memset(e, 0, sizeof(*e));
	e->known = TDB_K_RIP | TDB_K_RSP | TDB_K_SOURCE_INDEX | TDB_K_CPU | TDB_K_CS | TDB_K_SS | TDB_K_ARG | TDB_K_SOURCE |
		   TDB_K_RFLAGS;
	e->kind = TDB_DELIVER;
	e->arg = (uint8_t)b->vector;
	e->source = source;
	e->cpu = t->cpu;
	e->rip = b->ip;
	e->rsp = b->sp;
	e->cs = (uint16_t)b->cs;
	e->ss = (uint16_t)b->ss;
	e->rflags = b->rflags;
	e->source_index = (uint32_t)b->number;
	if (b->time >= 0) {
		e->time = (uint64_t)b->time;
		e->known |= TDB_K_TIME;
	}
	if (source == TDB_SRC_SOFT_INT) {
		e->code = b->vector == 3 ? 1 : 2;
		e->known |= TDB_K_CODE;
	} else if (source == TDB_SRC_EXCEPTION && (q->error_codes >> b->vector & 1)) {
		e->code = b->code;
		e->known |= TDB_K_CODE;
	}
	if (b->has_cr2 && source == TDB_SRC_EXCEPTION) {
		e->value = b->cr2;
		e->known |= TDB_K_VALUE;
	}
	if (b->smm)
		e->flags |= TDB_F_SMM;
	cpu->long_mode = (b->efer & LMA) != 0;
	if (cpu->long_mode) {
		t->count++;
	} else {
		e->flags |= TDB_F_LEGACY;
		q->legacy++;
	}
	if (t->tr_base == 0)
		q->before_ltr++;
	if (b->served >= 0 && source != TDB_SRC_EXTERNAL)
		q->told = 1;
	if (!cpu->touched)
		q->touch[q->touched++] = t->cpu;
	cpu->touched = 1;
	cpu->attempt = 1;
	cpu->ip = b->ip;
	cpu->sp = b->sp;
	cpu->cs = (uint16_t)b->cs;
	cpu->rflags = b->rflags;
	cpu->soft = b->soft;
	cpu->last = (int32_t)index;
	q->expected++;
	q->time = b->time;
	q->stamps |= b->stamps;
	return true;
}

int64_t qlog_scan(struct qlog *q, const uint8_t *text, size_t size, size_t limit, void *out, uint32_t max)
{
	struct tdb_event *events = out;
	struct cursor c;
	uint32_t count = 0;

	if (q == NULL || text == NULL || out == NULL || q->served == NULL || limit > size || max > INT32_MAX)
		return DEC_E_ARG;
	for (uint32_t i = 0; i < q->touched && i < QLOG_CPUS; i++)
		if (q->touch[i] < QLOG_CPUS)
			q->cpu[q->touch[i]].touched = 0;
	q->touched = 0;
	q->lines = 0;
	c.at = text;
	c.end = text + size;
	while (count < max && (size_t)(c.at - text) < limit) {
		struct cursor here = c;
		struct block b = { .time = q->time };
		/* Trace lines come in the hundreds where they come at all; the first letter of a block is none of theirs. */
		if (qemu_block_trace(&c, &q->time, &q->stamps)) {
			q->lines++;
			continue;
		}
		if (!qemu_block_read(&here, &b) || !make_event(q, &b, &events[count], count))
			break;
		count++;
		q->lines += b.lines;
		c = here;
	}
	q->used = (uint64_t)(c.at - text);
	return count;
}
