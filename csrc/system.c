/* system.c - the tables and registers that decide where frames go: TSS, IDT, MSRs, control registers. */
#include <stdlib.h>

#include "core.h"

#define MSR_MCG_STATUS 0x17a
#define MSR_X2APIC_TPR 0x808
#define MSR_FRED_RSP0 0x1cc
#define MSR_FRED_STKLVLS 0x1d0
#define MSR_FRED_CONFIG 0x1d4

void system_tss(struct machine *m, const struct cpu *c, const struct tdb_event *e)
{
	struct tdb_tss *tss = c->s.tss >= 0 ? &m->tss[c->s.tss] : NULL;
	uint32_t bit = e->arg;
	uint64_t *slot;

	if (!(e->known & TDB_K_ARG) || !(e->arg <= 2 || (e->arg >= 9 && e->arg <= 15))) {
		machine_refuse(m);
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

void gates_summarize(struct gates *g)
{
	const uint8_t usable = TDB_GATE_KNOWN | TDB_GATE_PRESENT;

	g->ist_maskable = 0;
	for (uint32_t v = 2; v < 256; v++)
		if ((v >= 32 || v == VECTOR_NMI || v == VECTOR_MC) && (g->gate[v].flags & usable) == usable && g->gate[v].ist)
			g->ist_maskable |= (uint8_t)(1u << g->gate[v].ist);
}

int system_gate(struct machine *m, const struct cpu *c, const struct tdb_event *e)
{
	struct gates *g;
	struct tdb_gate *gate;

	if (!(e->known & TDB_K_ARG)) {
		machine_refuse(m);
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
	gates_summarize(g);
	if ((e->known & (TDB_K_VALUE | TDB_K_CODE | TDB_K_CS)) != (TDB_K_VALUE | TDB_K_CODE | TDB_K_CS))
		return TDB_OK;
	gate->offset = e->value;
	gate->selector = e->cs;
	gate->ist = e->code & 7;
	gate->type = e->code >> 8 & 15;
	gate->dpl = e->code >> 13 & 3;
	gate->flags = TDB_GATE_KNOWN | (e->code >> 15 & 1 ? TDB_GATE_PRESENT : 0);
	gates_summarize(g);
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


void system_ltr(const struct machine *m, struct cpu *c, const struct tdb_event *e) { c->s.tss = find_tss(m, e); }

void system_lidt(const struct machine *m, struct cpu *c, const struct tdb_event *e) { c->s.idt = find_idt(m, e); }

/* -- registers ------------------------------------------------------------------------------------------------------- */

static void set_msr(struct cpu *c, enum known_msr n, const struct tdb_event *e)
{
	c->msr[n] = e->value;
	c->msr_known = e->known & TDB_K_VALUE ? c->msr_known | 1u << n : c->msr_known & ~(1u << n);
}

static void set_fred(struct cpu *c, uint64_t *msr, uint32_t bit, const struct tdb_event *e)
{
	bool known = e->known & TDB_K_VALUE;

	*msr = known ? e->value : 0;
	c->s.levels.known = known ? c->s.levels.known | bit : c->s.levels.known & ~bit;
}

/* SDM Vol. 4, table 2-2. */
void system_msr(struct cpu *c, const struct tdb_event *e)
{
	if (!(e->known & TDB_K_CODE))
		return;
	switch (e->code) {
	case MSR_MCG_STATUS:
		c->mcip_told = true;
		c->s.mcip = e->value >> 2 & 1;
		cpu_set_known(c, TDB_CK_MCIP, e->known & TDB_K_VALUE);
		break;
	case MSR_X2APIC_TPR:
		c->s.tpr = (uint8_t)e->value;
		cpu_set_known(c, TDB_CK_TPR, e->known & TDB_K_VALUE);
		break;
	case 0x174:
		set_msr(c, MSR_SYSENTER_CS, e);
		break;
	case 0x175:
		set_msr(c, MSR_SYSENTER_ESP, e);
		break;
	case 0x176:
		set_msr(c, MSR_SYSENTER_EIP, e);
		break;
	case 0xc0000081:
		set_msr(c, MSR_STAR, e);
		break;
	case 0xc0000082:
		set_msr(c, MSR_LSTAR, e);
		break;
	case 0xc0000084:
		set_msr(c, MSR_FMASK, e);
		break;
	case MSR_FRED_RSP0:
	case MSR_FRED_RSP0 + 1:
	case MSR_FRED_RSP0 + 2:
	case MSR_FRED_RSP0 + 3:
		set_fred(c, &c->s.levels.rsp[e->code - MSR_FRED_RSP0], 1u << (e->code - MSR_FRED_RSP0), e);
		break;
	case MSR_FRED_STKLVLS:
		set_fred(c, &c->s.levels.stklvls, TDB_FK_STKLVLS, e);
		break;
	case MSR_FRED_CONFIG:
		set_fred(c, &c->s.levels.config, TDB_FK_CONFIG, e);
		c->s.csl = e->value & 3;
		cpu_set_known(c, TDB_CK_CSL, e->known & TDB_K_VALUE);
		break;
	default:
		break;
	}
}

void system_cr(struct cpu *c, const struct tdb_event *e)
{
	if (!(e->known & TDB_K_ARG))
		return;
	if (e->arg == 4) {
		c->s.mce = e->value >> 6 & 1;
		cpu_set_known(c, TDB_CK_MCE, e->known & TDB_K_VALUE);
		if (e->known & TDB_K_VALUE)
			c->s.fred = e->value >> 32 & 1;
	} else if (e->arg == 8) {
		c->s.tpr = (uint8_t)((e->value & 15) << 4);
		cpu_set_known(c, TDB_CK_TPR, e->known & TDB_K_VALUE);
	}
}
