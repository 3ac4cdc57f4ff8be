/* ring.c - SYSCALL, SYSENTER, SYSRET: changes of ring without a change of stack (R31, SDM Vol. 3A 5.8.7, 5.8.8). */
#include "core.h"

static bool msr_known(const struct cpu *c, enum known_msr n) { return c->msr_known >> n & 1; }

static void set_rip(struct cpu *c, bool known, uint64_t value)
{
	c->s.rip = value;
	cpu_set_known(c, TDB_CK_RIP, known);
}

static void set_selectors(struct cpu *c, bool known, uint16_t cs, uint16_t ss)
{
	c->s.cs = cs;
	c->s.ss = ss;
	cpu_set_known(c, TDB_CK_CS | TDB_CK_SS, known);
}

/* The instruction ran in an outer ring. */
static void left_outer(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	if (!(e->known & TDB_K_CS) || !(e->cs & 3))
		return;
	if (e->known & TDB_K_RSP && (e->cs & 3) == 3) {
		c->s.user_rsp = e->rsp;
		c->s.known |= TDB_CK_USER_RSP;
	}
	observe_outer(m, e->cpu, index, true, NULL);
}

static void take_rsp(struct cpu *c, const struct tdb_event *e)
{
	if (e->known & TDB_K_RSP) {
		c->s.rsp = e->rsp;
		c->s.known |= TDB_CK_RSP;
	}
}

static void open_gap(struct cpu *c, const struct tdb_event *e, uint32_t index, uint32_t mov_ss)
{
	c->s.ring_gap = index;
	c->ring_rsp = e->rsp;
	c->ring_rsp_known = e->known & TDB_K_RSP;
	c->ring_mov_ss = mov_ss;
}

static void apply_syscall(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	uint16_t cs = (uint16_t)(c->msr[MSR_STAR] >> 32) & 0xfffc;
	bool addr = e->known & TDB_K_ADDR;

	left_outer(m, c, e, index);
	if (c->s.fred) {
		cpu_forget_registers(c);
		return;
	}
	take_rsp(c, e);
	set_rip(c, addr || msr_known(c, MSR_LSTAR), addr ? e->addr : c->msr[MSR_LSTAR]);
	set_selectors(c, msr_known(c, MSR_STAR), cs, (uint16_t)(cs + 8));
	c->s.rflags = e->rflags & ~(uint32_t)c->msr[MSR_FMASK];
	cpu_set_known(c, TDB_CK_RFLAGS, e->known & TDB_K_RFLAGS && msr_known(c, MSR_FMASK));
	open_gap(c, e, index, c->s.shadow == 2 ? c->shadow_event : NONE);
}

static void apply_sysenter(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	uint16_t cs = (uint16_t)c->msr[MSR_SYSENTER_CS] & 0xfffc;
	bool addr = e->known & TDB_K_ADDR;

	left_outer(m, c, e, index);
	set_rip(c, addr || msr_known(c, MSR_SYSENTER_EIP), addr ? e->addr : c->msr[MSR_SYSENTER_EIP]);
	set_selectors(c, msr_known(c, MSR_SYSENTER_CS), cs, (uint16_t)(cs + 8));
	c->s.rsp = c->msr[MSR_SYSENTER_ESP];
	cpu_set_known(c, TDB_CK_RSP, msr_known(c, MSR_SYSENTER_ESP));
	cpu_come_home(m, c);
	c->s.ring_gap = NONE;
	c->s.rflags = e->rflags & ~IF;
	cpu_set_known(c, TDB_CK_RFLAGS, e->known & TDB_K_RFLAGS);
}

static void apply_sysret(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	uint16_t star = (uint16_t)(c->msr[MSR_STAR] >> 48);
	struct tdb_frame since;

	if (e->flags & TDB_F_FAULTED) {                    /* a non-canonical RCX: #GP at CPL0 on the user's RSP */
		take_rsp(c, e);
		open_gap(c, e, index, NONE);
		return;
	}
	set_rip(c, e->known & TDB_K_ADDR, e->addr);
	set_selectors(c, msr_known(c, MSR_STAR), (uint16_t)(star + 16) | 3, (uint16_t)(star + 8) | 3);
	c->s.known &= ~TDB_CK_RFLAGS;
	take_rsp(c, e);
	if (e->known & TDB_K_RSP) {
		c->s.user_rsp = e->rsp;
		c->s.known |= TDB_CK_USER_RSP;
	}
	c->s.ring_gap = NONE;
	observe_outer(m, e->cpu, index, false, &since);
	if (m->in->fidelity & TDB_FID_RETURNS)             /* no IRET ended the blocking, nor does SYSRET (R14) */
		raise_stuck(m, c, e->cpu, index, TDB_EV_COMPUTED, &since);
}

void ring_apply(struct machine *m, struct cpu *c, const struct tdb_event *e, uint32_t index)
{
	if (e->kind == TDB_SYSCALL)
		apply_syscall(m, c, e, index);
	else if (e->kind == TDB_SYSENTER)
		apply_sysenter(m, c, e, index);
	else
		apply_sysret(m, c, e, index);
}
