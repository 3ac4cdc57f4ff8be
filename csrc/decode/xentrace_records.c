/* xentrace_records.c - the records of one CPU into events. */
#include "xentrace_state.h"

static struct tdb_event *add(struct xt *x, struct xt_cpu *c, unsigned kind, unsigned known, uint64_t time)
{
	struct xt_window *w = x->now;
	struct tdb_event *e = &x->event[x->used++];

	memset(e, 0, sizeof(*e));
	e->time = time;
	e->cpu = (uint16_t)w->cpu;
	e->kind = (uint8_t)kind;
	e->known = (uint16_t)(known | TDB_K_CPU);
	if (c->tsc_known)
		e->known |= TDB_K_TIME;
	w->count++;
	if (time > w->highest)
		w->highest = time;
	c->made++;
	return e;
}

/* A field of a payload that is as long as its record says. */
static uint64_t get(struct xt_field f, const uint8_t *w)
{
	const uint8_t *p = w + f.word * 4;

	if (f.bits > 32)
		return xt_word(p) | (uint64_t)xt_word(p + 4) << 32;
	return xt_word(p) >> f.shift & ((1ull << f.bits) - 1);
}

static bool in_exit(const struct xt_cpu *c)
{
	return c->exit > c->entry;
}

static void gap(struct xt *x, struct xt_cpu *c)
{
	x->told.gaps++;
	if (++x->generation >> 24) {
		memset(x->vector, 0, sizeof(x->vector));
		x->generation = 1;
	}
	c->entry = c->exit = c->stgi = c->intr = c->irq = 0;
}

void xt_cut(struct xt *x)
{
	struct xt_cpu *c = &x->cpu[x->now->cpu];

	add(x, c, TDB_GAP, 0, c->tsc);
	gap(x, c);
}

static void lost(struct xt *x, struct xt_cpu *c, const struct xt_record *r, const uint8_t *w)
{
	/* The record's own TSC is that of the end of the gap. */
	uint64_t first = get(r->time, w), records = get(r->value, w);
	struct tdb_event *e = add(x, c, TDB_GAP, TDB_K_VALUE | TDB_K_TIME, c->tsc_known && c->tsc < first ? c->tsc : first);

	e->value = records;
	x->told.lost += records;
	gap(x, c);
}

static void vm_exit(struct xt *x, struct xt_cpu *c, const struct xt_record *r, const uint8_t *w)
{
	uint64_t reason = get(r->code, w);
	struct tdb_event *e;

	if (!x->vendor) {
		x->vendor = r->vendor ? r->vendor : reason < XT_REASONS ? x->format.reason[reason] : XT_UNKNOWN;
		if (!x->vendor)
			x->told.exits_of_unknown_vendor++;
	}
	e = add(x, c, TDB_VMEXIT, TDB_K_ADDR | TDB_K_CODE, c->tsc);
	e->addr = get(r->value, w);    /* the guest's; the RIP of a native VM exit is the host's */
	e->code = (uint32_t)reason;
	if (x->vendor) {
		e->known |= TDB_K_ARG;
		e->arg = x->vendor == XT_SVM;
	}
	if (x->vendor == XT_SVM && reason == x->format.nmi_reason) {
		e->known |= TDB_K_SOURCE;
		e->source = TDB_SRC_NMI;
	}
	c->exit = c->made;
	c->exit_at = x->used;
}

/* A record inside of a VM exit says why it came about. */
static void exit_was(struct xt *x, struct xt_cpu *c, unsigned source)
{
	struct tdb_event *e;

	if (!in_exit(c)) {
		x->told.odd_records++;
		return;
	}
	if (!c->exit_at)
		return;
	e = &x->event[c->exit_at - 1];
	e->known |= TDB_K_SOURCE;
	e->source = (uint8_t)source;
}

/* A delivery to the hypervisor. On SVM an exit clears GIF; Xen has set it again by the time that it records anything. */
static struct tdb_event *deliver(struct xt *x, struct xt_cpu *c, unsigned source, unsigned known, uint64_t time)
{
	struct tdb_event *e;

	if (x->vendor == XT_SVM && in_exit(c) && c->stgi != c->exit) {
		e = add(x, c, TDB_UNBLOCK, TDB_K_ARG, time);
		e->arg = 1;
		c->stgi = c->exit;
	}
	e = add(x, c, TDB_DELIVER, TDB_K_SOURCE | known, time);
	e->source = (uint8_t)source;
	return e;
}

/* Something that the hypervisor injects, or wants to inject: the CPU's own state does not change by it. */
static struct tdb_event *request(struct xt *x, struct xt_cpu *c, uint64_t vector)
{
	struct tdb_event *e = add(x, c, TDB_RAISE, TDB_K_ARG | TDB_K_SOURCE, c->tsc);

	e->arg = (uint8_t)vector;
	e->source = TDB_SRC_INJECTED;
	return e;
}

/* What a record says beside the vector. */
static void fill(struct tdb_event *e, const struct xt_record *r, const uint8_t *w)
{
	if (r->rip.bits) {
		e->rip = get(r->rip, w);
		e->known |= TDB_K_RIP;
	}
	if (r->value.bits) {
		e->value = get(r->value, w);
		e->known |= TDB_K_VALUE;
	}
	if (r->code.bits && get(r->code, w) != r->none && (!r->coded.bits || get(r->coded, w))) {
		e->code = (uint32_t)get(r->code, w);
		e->known |= TDB_K_CODE;
	}
}

static uint64_t vector_of(const struct xt_record *r, const uint8_t *w)
{
	return r->vector.bits ? get(r->vector, w) : r->arg;
}

/* A trap of a PV guest. */
static void trap(struct xt *x, struct xt_cpu *c, const struct xt_record *r, const uint8_t *w)
{
	uint64_t vector = vector_of(r, w);
	struct tdb_event *e;

	if (vector > 0xff) {
		x->told.odd_records++;
		return;
	}
	if (x->format.made_up[vector]) {
		e = request(x, c, vector);
	} else {
		e = deliver(x, c, r->source, TDB_K_ARG, c->tsc);
		e->arg = (uint8_t)vector;
	}
	fill(e, r, w);
}

static void interrupt(struct xt *x, struct xt_cpu *c, const struct xt_record *r, const uint8_t *w, uint32_t words)
{
	/* VMX: acknowledged by the exit, with its vector, and handled after this record. SVM: delivered when GIF was set again,
	 * before Xen records the exit, and recorded as handled by then if it was a device's. */
	uint64_t vector = words > r->vector.word ? get(r->vector, w) : UINT64_MAX;

	if (vector <= 0xff) {
		deliver(x, c, r->source, TDB_K_ARG, c->tsc)->arg = (uint8_t)vector;
		c->intr = c->made;
		c->intr_vector = (uint8_t)vector;
	} else if (c->irq <= c->entry) {
		deliver(x, c, r->source, 0, c->tsc);
	}
}

static void handled(struct xt *x, struct xt_cpu *c, const struct xt_record *r, const uint8_t *w)
{
	uint64_t irq = get(r->irq, w);
	uint32_t found = irq < XT_IRQS && x->vector[irq] >> 8 == x->generation ? x->vector[irq] : 0;
	uint64_t time = c->tsc, took = (uint32_t)(c->tsc - get(r->time, w));
	struct tdb_event *e;

	if (in_exit(c) && c->intr > c->exit && (!found || (uint8_t)found == c->intr_vector)) {
		c->intr = 0;
		return;                /* the one of XT_INTR */
	}
	/* The record comes after the handler, and after whatever that recorded: the CPU's events stay in order. */
	if (took <= time && x->now->count && x->event[x->used - 1].time <= time - took)
		time -= took;
	e = deliver(x, c, r->source, found ? TDB_K_ARG : 0, time);
	e->arg = (uint8_t)found;
	c->irq = c->made;
}

static void mark(struct xt *x, struct xt_cpu *c, const struct xt_record *r, const uint8_t *w)
{
	uint32_t n = r->text + (r->value.bits ? (uint32_t)get(r->value, w) : 0);
	struct tdb_event *e = add(x, c, TDB_MARK, TDB_K_VALUE | TDB_K_CODE, c->tsc);

	if (!x->text_at[n]) {
		x->text_at[n] = x->text_end + 1;
		x->text_end += x->format.length[n];
		x->told.text[x->told.texts++] = (uint16_t)n;
	}
	e->value = x->text_at[n] - 1;
	e->code = x->format.length[n];
	e->flags = TDB_F_BYTES;
}

static void make(struct xt *x, struct xt_cpu *c, const struct xt_record *r, const uint8_t *w, uint32_t words)
{
	uint64_t vector, irq;

	switch ((enum xt_make)r->make) {
	case XT_LOST:
		lost(x, c, r, w);
		break;
	case XT_ENTRY:
		add(x, c, TDB_VMENTRY, 0, c->tsc);
		c->entry = c->made;
		break;
	case XT_EXIT:
		vm_exit(x, c, r, w);
		break;
	case XT_RAISE:
		vector = vector_of(r, w);
		if (vector > 0xff)
			x->told.odd_records++;
		else
			fill(request(x, c, vector), r, w);
		break;
	case XT_WAIT:
		vector = get(r->code, w);
		vector = vector < sizeof(x->format.wait) ? x->format.wait[vector] : 0;
		if (vector)
			request(x, c, vector);
		break;
	case XT_EXIT_WAS:
		exit_was(x, c, r->source);
		break;
	case XT_EXIT_NMI:
		exit_was(x, c, r->source);
		if (x->vendor == XT_SVM)
			deliver(x, c, r->source, TDB_K_ARG, c->tsc)->arg = r->arg;
		break;
	case XT_INTR:
		interrupt(x, c, r, w, words);
		break;
	case XT_TRAP:
		trap(x, c, r, w);
		break;
	case XT_DELIVER:
		vector = vector_of(r, w);
		if (vector > 0xff) {
			x->told.odd_records++;
		} else {
			struct tdb_event *e = deliver(x, c, r->source, TDB_K_ARG, c->tsc);

			e->arg = (uint8_t)vector;
			fill(e, r, w);
		}
		break;
	case XT_BIND:
		irq = get(r->irq, w);
		vector = get(r->vector, w);
		if (irq < XT_IRQS && vector <= 0xff)
			x->vector[irq] = x->generation << 8 | (uint32_t)vector;
		break;
	case XT_UNBIND:
		irq = get(r->irq, w);
		if (irq < XT_IRQS)
			x->vector[irq] = 0;
		break;
	case XT_HANDLED:
		handled(x, c, r, w);
		break;
	case XT_MARK:
		mark(x, c, r, w);
		break;
	case XT_WRAP:
	case XT_MAKES:
		break;
	}
}

static const struct xt_record *find(const struct xt *x, uint32_t event)
{
	uint32_t at = xt_hash(event), n;

	while ((n = x->slot[at])) {
		if (x->format.record[n - 1].event == event)
			return &x->format.record[n - 1];
		at = (at + 1) % XT_SLOTS;
	}
	return NULL;
}

uint64_t xt_records(struct xt *x, const uint8_t *data, uint64_t size, enum xt_stop *ret)
{
	struct xt_cpu *c = &x->cpu[x->now->cpu];
	uint64_t at = 0;

	*ret = XT_STARVED;
	while (size - at >= 4) {
		const uint8_t *p = data + at;
		uint32_t header = xt_word(p), bytes = xt_bytes(header);
		const struct xt_record *r;

		if (bytes > size - at)
			break;
		if (header == x->format.window) {
			*ret = XT_WINDOW;
			break;
		}
		if (xt_full(x)) {
			*ret = XT_FULL;
			break;
		}
		at += bytes;
		x->told.records++;
		r = find(x, header & XT_EVENT_MASK);
		if (r && r->make == XT_WRAP)
			continue;
		p += 4;
		if (header & XT_TSC_BIT) {
			c->tsc = xt_word(p) | (uint64_t)xt_word(p + 4) << 32;
			c->tsc_known = true;
			p += 8;
		}
		if (!r)
			continue;
		if ((header >> 28 & 7) < r->words)
			x->told.odd_records++;
		else
			make(x, c, r, p, header >> 28 & 7);
	}
	return at;
}
