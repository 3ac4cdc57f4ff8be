/* xentrace.c - goes through the windows of a file. */
#include "xentrace_state.h"

enum { HEADER_BYTES = 12, FEWEST_HELD = 8, MOST_HELD = 1 << 30 };

struct input {
	const uint8_t *data;
	uint64_t size, at;
	bool last;
};

int64_t xt_size(uint64_t held)
{
	if (held < FEWEST_HELD || held > MOST_HELD)
		return DEC_E_ARG;
	return (int64_t)((sizeof(struct xt) + 63) / 64 * 64 + held * sizeof(struct tdb_event));
}

static bool field_ok(struct xt_field f, unsigned words)
{
	if (!f.bits)
		return true;
	if (f.bits > 32)
		return f.bits == 64 && !f.shift && f.word + 2u <= words;
	return f.shift + f.bits <= 32 && f.word < words;
}

static bool record_ok(const struct xt_format *f, const struct xt_record *r)
{
	/* The vector of an interrupt is looked for only where the payload has that word. */
	unsigned vector_words = r->make == XT_INTR ? XT_WORDS : r->words;

	return r->make < XT_MAKES && r->words <= XT_WORDS && r->event <= XT_EVENT_MASK && r->vendor <= XT_SVM &&
	       field_ok(r->vector, vector_words) && r->vector.bits <= 32 && field_ok(r->code, r->words) && r->code.bits <= 32 &&
	       field_ok(r->value, r->words) && field_ok(r->rip, r->words) && field_ok(r->time, r->words) &&
	       field_ok(r->irq, r->words) && field_ok(r->coded, r->words) &&
	       (r->make != XT_MARK || (r->value.bits <= 8 && r->text + (1u << r->value.bits) <= f->texts));
}

static bool format_ok(const struct xt_format *f)
{
	if (f->records > XT_RECORDS || f->texts > XT_TEXTS || f->vendor > XT_SVM)
		return false;
	for (uint32_t n = 0; n < f->records; n++)
		if (!record_ok(f, &f->record[n]))
			return false;
	for (uint32_t n = 0; n < XT_REASONS; n++)
		if (f->reason[n] > XT_SVM)
			return false;
	return true;
}

int xt_open(void *memory, uint64_t held, const struct xt_format *format)
{
	struct xt *x = memory;

	if (!memory || (uintptr_t)memory % 64 || !format || xt_size(held) < 0 || !format_ok(format))
		return DEC_E_ARG;
	x->format = *format;
	x->event = (struct tdb_event *)((char *)memory + (sizeof(struct xt) + 63) / 64 * 64);
	x->cap = (uint32_t)held;
	x->vendor = format->vendor;
	x->generation = 1;
	x->text_end = format->text_at;
	for (uint32_t n = 0; n < format->records; n++) {
		uint32_t at = xt_hash(format->record[n].event);

		while (x->slot[at])
			at = (at + 1) % XT_SLOTS;
		x->slot[at] = (uint8_t)(n + 1);
	}
	return DEC_OK;
}

static void damaged(struct xt *x, const struct input *in, enum xt_what what)
{
	if (x->told.damages < XT_DAMAGES)
		x->told.damage[x->told.damages] = (struct xt_damage){ .at = x->offset + in->at, .what = what };
	x->told.damages++;
}

static void end(struct xt *x, uint8_t how)
{
	x->told.ended = how;
	x->phase = XT_END;
	xt_flush(x);
}

/* Each of these does one step; false: it needs more input. */

static bool header(struct xt *x, struct input *in)
{
	const uint8_t *p = in->data + in->at;
	uint64_t rest = in->size - in->at;
	uint32_t cpu, bytes;

	if (rest < HEADER_BYTES && !in->last)
		return false;
	if (!rest) {
		end(x, 1);
		return true;
	}
	if (rest < HEADER_BYTES) {
		damaged(x, in, XT_CUT_SHORT);
		end(x, 2);
		return true;
	}
	cpu = xt_word(p + 4);
	bytes = xt_word(p + 8);
	if (xt_word(p) != x->format.window || cpu >= XT_CPUS || bytes % 4) {
		damaged(x, in, XT_NO_WINDOW);
		end(x, 2);
		return true;
	}
	if (x->news && cpu <= x->now->cpu) {
		xt_round(x);
		return true;           /* and look at this one again */
	}
	in->at += HEADER_BYTES;
	x->told.windows++;
	x->left = bytes;
	xt_begin(x, cpu);
	x->phase = XT_IN_WINDOW;
	return true;
}

static bool in_window(struct xt *x, struct input *in)
{
	uint64_t size = in->size - in->at, taken;
	bool whole = size >= x->left;
	enum xt_stop stop;

	taken = xt_records(x, in->data + in->at, whole ? x->left : size, &stop);
	in->at += taken;
	x->left -= taken;
	if (stop == XT_FULL) {
		xt_overfull(x);
	} else if (stop == XT_WINDOW) {
		damaged(x, in, XT_INSIDE);
		x->left = 0;
		x->phase = XT_CUT;
	} else if (!x->left) {
		x->phase = XT_HEADER;
	} else if (whole || in->last) {
		damaged(x, in, whole ? XT_TOO_LONG : XT_CUT_SHORT);
		x->phase = XT_CUT;
	} else {
		return false;
	}
	return true;
}

static bool cut(struct xt *x)
{
	if (xt_full(x)) {
		xt_overfull(x);
	} else {
		xt_cut(x);
		x->phase = XT_SKIP;
	}
	return true;
}

static bool skip(struct xt *x, struct input *in)
{
	uint64_t rest = in->size - in->at, n = rest < x->left ? rest : x->left;

	in->at += n;
	x->left -= n;
	if (x->left && !in->last)
		return false;
	x->phase = XT_HEADER;
	return true;
}

static bool step(struct xt *x, struct input *in)
{
	switch (x->phase) {
	case XT_HEADER:
		return header(x, in);
	case XT_IN_WINDOW:
		return in_window(x, in);
	case XT_CUT:
		return cut(x);
	case XT_SKIP:
		return skip(x, in);
	case XT_END:
		break;
	}
	in->at = in->size;
	return false;
}

int64_t xt_read(struct xt *x, const uint8_t *data, uint64_t size, int last, const struct tdb_event **ret, uint64_t *count)
{
	struct input in = { data, size, 0, last };

	if (!x || (size && !data) || size > INT64_MAX || !ret || !count)
		return DEC_E_ARG;
	*count = 0;
	do {
		if (x->draining && xt_drain(x, ret, count))
			break;
	} while (x->draining || step(x, &in));
	x->offset += in.at;
	return (int64_t)in.at;
}

void xt_tell(const struct xt *x, struct xt_told *ret)
{
	*ret = x->told;
	ret->vendor = x->vendor;
}
