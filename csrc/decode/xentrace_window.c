/* xentrace_window.c - the windows of the CPUs: their events in one order, in bounded memory.
 *
 * The tool polls the CPUs in turn and writes all that a CPU has, a window each.  What it finds in the round after the next is
 * younger than everything in this one, so two rounds are enough.  A round ends where the CPU number does not rise.  The
 * events of one CPU stay in the order of their records, whatever their TSCs say. */
#include "xentrace_state.h"

/* Whether what is held, or (with those that are empty) began in this round, is of more than one CPU. */
static bool several(const struct xt *x)
{
	const struct xt_window *w = x->window;

	return x->olds > 1 || x->news > 1 || (x->olds && x->news && w[0].cpu != w[1].cpu);
}

static void add_run(struct xt *x, uint32_t first, uint32_t count, uint64_t floor)
{
	if (count)
		x->run[x->runs++] = (struct dec_run){ x->event + first, count, floor };
}

/* How many events at the beginning of a window are no younger than the limit. */
static uint32_t early(const struct xt *x, const struct xt_window *w, uint64_t limit)
{
	uint32_t n = 0;

	while (n < w->count && x->event[w->first + n].time <= limit)
		n++;
	return n;
}

/* Let the CPU of a window know that events [first, first + gone) are held no more, and the others lie elsewhere. */
static void moved(struct xt *x, const struct xt_window *w, uint32_t gone, uint32_t to)
{
	struct xt_cpu *c = &x->cpu[w->cpu];

	if (c->exit_at <= w->first || c->exit_at > w->first + w->count)
		return;
	c->exit_at = c->exit_at <= w->first + gone ? 0 : c->exit_at - (w->first + gone) + to;
}

void xt_begin(struct xt *x, uint32_t cpu)
{
	x->now = &x->window[x->olds + x->news++];
	*x->now = (struct xt_window){ .first = x->used, .cpu = cpu };
	if (cpu >= x->told.cpus)
		x->told.cpus = cpu + 1;
}

static void drop_empty(struct xt *x)
{
	uint32_t kept = x->olds;

	for (uint32_t n = x->olds; n < x->olds + x->news; n++)
		if (x->window[n].count)
			x->window[kept++] = x->window[n];
	x->news = kept - x->olds;
	x->now = NULL;
}

void xt_round(struct xt *x)
{
	struct xt_window *w, *end;
	uint64_t limit = 0;

	drop_empty(x);
	end = x->window + x->olds + x->news;
	x->draining = true;
	x->flushing = false;
	x->runs = 0;
	x->merging = several(x);
	for (w = x->window; w < x->window + x->olds; w++) {
		add_run(x, w->first, w->count, 0);
		limit = w->highest > limit ? w->highest : limit;
	}
	for (; w < end; w++) {
		uint32_t old = x->cpu[w->cpu].old;

		w->early = x->olds && x->merging ? early(x, w, limit) : 0;
		add_run(x, w->first, w->early, old ? x->window[old - 1].highest : 0);
	}
}

void xt_flush(struct xt *x)
{
	x->draining = x->flushing = true;
	x->runs = 0;
	x->merging = several(x);
	for (uint32_t n = 0; n < x->olds + x->news; n++) {
		const struct xt_window *w = &x->window[n];
		uint32_t old = n < x->olds ? 0 : x->cpu[w->cpu].old;

		add_run(x, w->first, w->count, old ? x->window[old - 1].highest : 0);
	}
}

void xt_overfull(struct xt *x)
{
	x->told.unordered += several(x);
	xt_flush(x);
}

/* After a round: what is left of this one is the round before. */
static void settle_round(struct xt *x)
{
	uint32_t to = 0, n;

	for (n = 0; n < x->olds; n++) {
		moved(x, &x->window[n], x->window[n].count, 0);
		x->cpu[x->window[n].cpu].old = 0;
	}
	for (n = 0; n < x->news; n++) {
		struct xt_window w = x->window[x->olds + n];

		moved(x, &w, w.early, to);
		w.count -= w.early;
		memmove(x->event + to, x->event + w.first + w.early, w.count * sizeof(*x->event));
		w.first = to;
		w.early = 0;
		to += w.count;
		x->window[n] = w;
	}
	x->used = to;
	x->olds = 0;
	for (n = 0; n < x->news; n++) {
		if (!x->window[n].count)
			continue;
		x->window[x->olds++] = x->window[n];
		x->cpu[x->window[n].cpu].old = x->olds;
	}
	x->news = 0;
}

/* After all was given out: the windows of this round go on, empty. */
static void settle_flush(struct xt *x)
{
	uint32_t n;

	for (n = 0; n < x->olds + x->news; n++)
		moved(x, &x->window[n], x->window[n].count, 0);
	for (n = 0; n < x->olds; n++)
		x->cpu[x->window[n].cpu].old = 0;
	for (n = 0; n < x->news; n++) {
		x->window[n] = x->window[x->olds + n];
		x->window[n].first = x->window[n].count = 0;
		x->window[n].highest = 0;
	}
	x->now = x->news ? &x->window[x->news - 1] : NULL;
	x->olds = x->used = 0;
}

bool xt_drain(struct xt *x, const struct tdb_event **ret, uint64_t *count)
{
	uint32_t kept = 0;

	for (uint32_t n = 0; n < x->runs; n++)
		if (x->run[n].count)
			x->run[kept++] = x->run[n];
	x->runs = kept;
	if (!kept) {
		x->draining = false;
		if (x->flushing)
			settle_flush(x);
		else
			settle_round(x);
		return false;
	}
	if (x->merging && kept > 1) {
		*count = (uint64_t)dec_merge(x->run, kept, x->heap, UINT64_MAX, x->piece, XT_PIECE);
		*ret = x->piece;
	} else {
		struct dec_run *r = x->run;

		*count = r->count < XT_PIECE ? r->count : XT_PIECE;
		*ret = r->event;
		r->event += *count;
		r->count -= *count;
	}
	return true;
}
