/*
 * qemu_block.c - see qemu_block.h.
 *
 * The forms are those of formats/qemu/patterns.py, but for what may be odd there: here each column must be as QEMU prints it, so
 * that no part of another line can stand in a block.
 */
#include "qemu_block.h"

#include "qemu_log.h"

enum {
	WORDS = 40,       /* bytes of words at the end of a line of a register dump, at most */
	TRACE_LINE = 200
};

/* -- stamps ------------------------------------------------------------------------------------------------------- */

/* Days from 1970-01-01 to the first of a month (proleptic Gregorian calendar). */
static int64_t month_start(int64_t year, int64_t month)
{
	static const int16_t BEFORE[12] = { 0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334 };
	int64_t past = year - 1;
	int64_t days = past * 365 + past / 4 - past / 100 + past / 400 - 719162;

	if (month > 2 && year % 4 == 0 && (year % 100 != 0 || year % 400 == 0))
		days++;
	return days + BEFORE[month - 1];
}

/* `2026-11-23T08:00:00.123456Z `, if it stands here. False: what stands here is damaged. */
static bool iso_stamp(struct cursor *c, int64_t *time, bool *found)
{
	uint64_t year, month, day, hour, minute, second, micro = 0;

	*found = left(c) > 4 && c->at[4] == '-';
	if (!*found)
		return true;
	if (!decimals(c, 4, &year) || !IS(c, "-") || !decimals(c, 2, &month) || !IS(c, "-") || !decimals(c, 2, &day) ||
	    !IS(c, "T") || !decimals(c, 2, &hour) || !IS(c, ":") || !decimals(c, 2, &minute) || !IS(c, ":") ||
	    !decimals(c, 2, &second))
		return false;
	if (IS(c, ".") && !decimals(c, 6, &micro))
		return false;
	if (!IS(c, "Z ") || year < 1970 || month < 1 || month > 12 || day < 1 || day > 31 || hour > 23 || minute > 59 ||
	    second > 60)
		return false;
	int64_t days = month_start((int64_t)year, (int64_t)month) + (int64_t)day - 1;
	*time = (days * 86400 + (int64_t)(hour * 3600 + minute * 60 + second)) * 1000000 + (int64_t)micro;
	return true;
}

/* An ISO stamp at the beginning of a line, into the block's time. */
static bool line_stamp(struct cursor *c, struct block *b, bool *found)
{
	int64_t time;

	if (!iso_stamp(c, &time, found))
		return false;
	if (*found) {
		b->stamps |= QLOG_LINE_STAMP;
		b->time = time > b->time ? time : b->time;
	}
	return true;
}

/* -- lines of trace events ----------------------------------------------------------------------------------------- */

/* Whether a trace line says nothing of who asked for an interrupt; c stands on its name. */
static bool is_boring(struct cursor *c)
{
	static const struct {
		const char *name;
		uint8_t size;
	} NAMES[] = {
#define NAME(text) { text, sizeof(text) - 1 }
		NAME("apic_mem_readl "), NAME("apic_register_read "), NAME("apic_report_irq_delivered "),
		NAME("apic_reset_irq_delivered "), NAME("apic_get_irq_delivered "), NAME("pic_set_irq "),
		NAME("pic_update_irq "), NAME("pic_ioport_read "), NAME("pic_ioport_write "), NAME("ioapic_mem_read "),
		NAME("ioapic_mem_write "), NAME("ioapic_set_irq "), NAME("ioapic_eoi_broadcast "),
#undef NAME
	};

	for (size_t i = 0; i < sizeof(NAMES) / sizeof(*NAMES); i++)
		if (is(c, NAMES[i].name, NAMES[i].size))
			return true;
	/* All registers but the low half of the ICR (0x300) and the LVT (0x320 and up). */
	return IS(c, "apic_mem_writel 0x") && left(c) > 1 && (c->at[0] != '3' || c->at[1] == '1');
}

bool qemu_block_trace(struct cursor *c, int64_t *last, uint32_t *seen)
{
	struct cursor here = *c;
	int64_t time = -1;
	uint64_t number, second, micro;
	uint32_t stamps = 0;
	bool found;

	if (left(&here) > 0 && *here.at >= '0' && *here.at <= '9') {
		if (!iso_stamp(&here, &time, &found))
			return false;
		if (found) {
			stamps = QLOG_LINE_STAMP;
		} else {
			if (!decimal(&here, 10, &number) || !IS(&here, "@") || !decimal(&here, 12, &second) || !IS(&here, ".") ||
			    !decimals(&here, 6, &micro) || !IS(&here, ":"))
				return false;
			stamps = QLOG_TRACE_STAMP;
			time = (int64_t)(second * 1000000 + micro);
		}
	}
	const uint8_t *name = here.at;
	if (!is_boring(&here) || !line(&here, TRACE_LINE) || memchr(name, 'Z', (size_t)(here.at - name)) != NULL)
		return false;
	*seen |= stamps;
	*last = time > *last ? time : *last;
	*c = here;
	return true;
}

/* -- blocks -------------------------------------------------------------------------------------------------------- */

/* The line before a `v=` line that says why. */
static bool lead(struct cursor *c, struct block *b, int64_t *raised)
{
	const struct cursor start_of_line = *c;
	const struct block before = *b;
	uint64_t old, new;
	uint32_t vector;
	bool stamped;

	if (!line_stamp(c, b, &stamped))
		return false;
	if (IS(c, "check_exception old: 0x")) {
		const uint8_t *start = c->at;
		while (left(c) > 0 && c->at - start < 8 && HEX[*c->at] != 0)
			c->at++;
		struct cursor digits = { start, c->at };
		if (c->at == start || !hex(&digits, (unsigned)(c->at - start), &old) || old == 8 || !IS(c, " new 0x"))
			return false;
		start = c->at;
		while (left(c) > 0 && c->at - start < 8 && HEX[*c->at] != 0)
			c->at++;
		digits = (struct cursor){ start, c->at };
		if (c->at == start || !hex(&digits, (unsigned)(c->at - start), &new) || !IS(c, "\n"))
			return false;
		*raised = (int64_t)new;
		b->old = (int64_t)old;
		b->lines++;
	} else if (IS(c, "Servicing hardware INT=0x")) {
		if (!hex32(c, 2, &vector) || !IS(c, "\n"))
			return false;
		b->served = (int32_t)vector;
		b->lines++;
	} else { /* there is none */
		*c = start_of_line;
		*b = before;
	}
	return true;
}

/* The `v=` line, in the three pieces that it is printed in. */
static bool head(struct cursor *c, struct block *b)
{
	uint64_t number, pc;
	uint32_t soft;
	unsigned digits, more, spaces = 0;
	int64_t ignored;
	bool stamped, inner;

	if (!line_stamp(c, b, &stamped))
		return false;
	while (spaces < 5 && IS(c, " "))
		spaces++;
	if (!decimal(c, 10, &number) || !IS(c, ": v=") || !hex32(c, 2, &b->vector) || !IS(c, " e=") || !hex32(c, 4, &b->code) ||
	    !IS(c, " i=") || !hex32(c, 1, &soft) || soft > 1 || !IS(c, " cpl=") || left(c) < 1 || *c->at < '0' || *c->at > '3')
		return false;
	c->at++;
	if (!IS(c, " IP=") || !hex32(c, 4, &b->cs) || !IS(c, ":") || !address(c, &b->ip, &digits) || !IS(c, " pc=") ||
	    !address(c, &pc, &more) || more != digits || !IS(c, " SP=") || !hex32(c, 4, &b->ss) || !IS(c, ":") ||
	    !hex(c, digits, &b->sp))
		return false;
	b->number = number;
	b->soft = soft != 0;
	if (stamped && (!iso_stamp(c, &ignored, &inner) || !inner))
		return false;
	b->has_cr2 = IS(c, " CR2=");
	if (b->has_cr2 != (b->vector == 14) || (!b->has_cr2 && !IS(c, " env->regs[R_EAX]=")) || !hex(c, digits, &b->cr2))
		return false;
	if (stamped && (!iso_stamp(c, &ignored, &inner) || !inner))
		return false;
	b->lines++;
	return IS(c, "\n");
}

/* The rest of a line in words of the dump, which hold no part of any other line. */
static bool words(struct cursor *c)
{
	for (unsigned i = 0; i < WORDS && left(c) > 0; i++) {
		switch (*c->at++) {
		case '\n':
			return true;
		case '@': case ':': case '_': case 'Z': case 'X': case 'p': case 'c': case 'G': case 'U':
			return false; /* one of these is in all that qemu_patterns.py looks for */
		}
	}
	return false;
}

/* The name at the end of the CCS line. */
static bool last_word(struct cursor *c)
{
	for (unsigned i = 0; i < WORDS && left(c) > 0; i++) {
		uint8_t letter = *c->at++;
		if (letter == '\n')
			return true;
		if (!(letter >= 'A' && letter <= 'Z') && !(letter >= '0' && letter <= '9'))
			return false;
	}
	return false;
}

/* A line of registers: names of 4 bytes with the "=", a blank between. */
static bool registers(struct cursor *c, const char *names, unsigned n, unsigned digits)
{
	for (unsigned i = 0; i < n; i++, names += 4)
		if ((i > 0 && !IS(c, " ")) || !is(c, names, 4) || !digits_only(c, digits))
			return false;
	return IS(c, "\n");
}

/* The line of RIP. */
static bool flags_line(struct cursor *c, struct block *b, bool wide, uint64_t *ip)
{
	uint32_t smm;

	if (!is(c, wide ? "RIP=" : "EIP=", 4) || !hex(c, wide ? 16 : 8, ip) || !is(c, wide ? " RFL=" : " EFL=", 5) ||
	    !hex32(c, 8, &b->rflags) || !IS(c, " ["))
		return false;
	for (unsigned i = 0; i < 7; i++)
		if (left(c) == 0 || (*c->at != '-' && *c->at != (uint8_t)"DOSZAPC"[i]) || !skip(c, 1))
			return false;
	if (!IS(c, "] CPL=") || !digits_only(c, 1) || !IS(c, " II=") || !digits_only(c, 1) || !IS(c, " A20=") ||
	    !digits_only(c, 1) || !IS(c, " SMM=") || !hex32(c, 1, &smm) || smm > 1 || !IS(c, " HLT=") || !digits_only(c, 1))
		return false;
	b->smm = smm != 0;
	return IS(c, "\n");
}

static bool general_registers(struct cursor *c, struct block *b, bool *wide)
{
	const uint8_t *start = c->at;
	uint64_t ip, sp;

	*wide = left(c) > 0 && *c->at == 'R';
	if (*wide) {
		if (!registers(c, "RAX=RBX=RCX=RDX=", 4, 16) || !registers(c, "RSI=RDI=RBP=RSP=", 4, 16))
			return false;
		struct cursor stack = { c->at - 17, c->at };
		if (!hex(&stack, 16, &sp) || !registers(c, "R8 =R9 =R10=R11=", 4, 16) || !registers(c, "R12=R13=R14=R15=", 4, 16))
			return false;
		if (left(c) > 4 && memcmp(c->at, "R16=", 4) == 0 && /* APX */
		    (!registers(c, "R16=R17=R18=R19=", 4, 16) || !registers(c, "R20=R21=R22=R23=", 4, 16) ||
		     !registers(c, "R24=R25=R26=R27=", 4, 16) || !registers(c, "R28=R29=R30=R31=", 4, 16)))
			return false;
	} else {
		if (!registers(c, "EAX=EBX=ECX=EDX=", 4, 8) || !registers(c, "ESI=EDI=EBP=ESP=", 4, 8))
			return false;
		struct cursor stack = { c->at - 9, c->at };
		if (!hex(&stack, 8, &sp))
			return false;
	}
	b->lines += (uint32_t)(c->at - start) / (*wide ? 84 : 52);
	if (!flags_line(c, b, *wide, &ip))
		return false;
	b->lines++;
	/* The dump of another thread? */
	return *wide ? ip == b->ip && sp == b->sp : ip == (b->ip & 0xffffffff) && sp == (b->sp & 0xffffffff);
}

/* `ES =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]` */
static bool segment(struct cursor *c, const char *name, unsigned digits, uint64_t *base)
{
	if (!is(c, name, 4) || !digits_only(c, 4) || !IS(c, " ") || !hex(c, digits, base) || !IS(c, " ") || !digits_only(c, 8) ||
	    !IS(c, " ") || !digits_only(c, 8))
		return false;
	if (!IS(c, " DPL="))
		return IS(c, "\n");
	return words(c);
}

static bool register_dump(struct cursor *c, struct block *b)
{
	static const char SEGMENTS[] = "ES =CS =SS =DS =FS =GS =LDT=";
	uint64_t ignored;
	unsigned digits, other;
	bool wide;

	if (!general_registers(c, b, &wide))
		return false;
	for (const char *name = SEGMENTS; *name != '\0'; name += 4)
		if (!segment(c, name, wide ? 16 : 8, &ignored))
			return false;
	if (!segment(c, "TR =", wide ? 16 : 8, &b->tr))
		return false;
	b->digits = 4 | wide;
	if (!IS(c, "GDT=     ") || !address(c, &ignored, &digits) || (wide && digits != 16) || !IS(c, " ") || !digits_only(c, 8) ||
	    !IS(c, "\nIDT=     ") || !address(c, &b->idt, &other) || other != digits || !IS(c, " ") || !digits_only(c, 8))
		return false;
	b->digits |= digits == 16 ? 2 : 0;
	if (!IS(c, "\nCR0=") || !digits_only(c, 8) || !IS(c, " CR2=") || !digits_only(c, digits) || !IS(c, " CR3=") ||
	    !digits_only(c, digits) || !IS(c, " CR4=") || !digits_only(c, 8) || !IS(c, "\nDR0=") || !address(c, &ignored, &digits))
		return false;
	if (!IS(c, " DR1=") || !digits_only(c, digits) || !IS(c, " DR2=") || !digits_only(c, digits) || !IS(c, " DR3=") ||
	    !digits_only(c, digits) || !IS(c, " \nDR6=") || !digits_only(c, digits) || !IS(c, " DR7=") || !digits_only(c, digits) ||
	    !IS(c, "\n"))
		return false;
	b->lines += 13 + 1; /* ES to TR, GDT, IDT, CR0, DR0, DR6; EFER */
	if (IS(c, "CCS=")) {
		b->lines++;
		if (!digits_only(c, wide ? 16 : 8) || !IS(c, " CCD=") || !digits_only(c, wide ? 16 : 8) || !IS(c, " CCO=") ||
		    !last_word(c))
			return false;
	}
	return IS(c, "EFER=") && hex(c, 16, &b->efer) && IS(c, "\n");
}

bool qemu_block_read(struct cursor *c, struct block *b)
{
	int64_t raised = -1;

	b->served = -1;
	b->old = -1;
	if (!lead(c, b, &raised) || !head(c, b))
		return false;
	if ((raised >= 0 && raised != (int64_t)b->vector) || (b->served >= 0 && (uint32_t)b->served != b->vector))
		return false;
	if (b->soft && (raised >= 0 || b->served >= 0))
		return false;
	return register_dump(c, b);
}
