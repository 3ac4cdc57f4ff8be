/* history.c - when were these bytes stored, read or popped, when did this frame end, what came at this time. */
#include "core.h"

#define WATCH_LIMIT 65536             /* bytes that can be watched */

/* Whether [addr, addr + length), cut at 2^64, touches what is watched. */
static bool touches(const struct tdb_watch *w, uint64_t addr, uint64_t length)
{
	return length && (addr <= w->lo ? w->lo - addr < length : addr < w->hi);
}

/* The last applied event stored some of the bytes: that is what they say of their writers. */
static bool stored(const struct machine *m, const struct tdb_watch *w, uint32_t index)
{
	for (uint64_t page = w->lo >> PAGE_SHIFT; page <= (w->hi - 1) >> PAGE_SHIFT; page++) {
		const struct page *p = memory_page(&m->mem, page);
		uint64_t base = page << PAGE_SHIFT;
		uint64_t first = w->lo > base ? w->lo - base : 0;
		uint64_t end = (w->hi - 1) >> PAGE_SHIFT == page ? w->hi - base : PAGE_WORDS * 8;

		if (!p || p->stamp != index)
			continue;
		for (uint64_t at = first; at < end; at++)
			if (page_writer(p, (uint32_t)(at >> 3), (uint32_t)(at & 7)) == index)
				return true;
	}
	return false;
}

/* The five words that a return takes; an ERET skips the error code that RSP is at. */
static bool pops(const struct machine *m, const struct tdb_watch *w, const struct tdb_event *e)
{
	bool eret = e->known & TDB_K_ARG && (e->arg == TDB_RET_ERETU || e->arg == TDB_RET_ERETS);

	if (!(e->known & TDB_K_RSP) || e->flags & (TDB_F_FAULTED | TDB_F_LEGACY | TDB_F_SMM) || m->cpu[e->cpu].s.smm ||
	    e->rsp > UINT64_MAX - 64)
		return false;
	return touches(w, e->rsp + (eret ? 8 : 0), 40);
}

/* A move copies the newest live frame of its CPU that begins there, from there to its end. */
static bool copies(const struct machine *m, const struct tdb_watch *w, const struct tdb_event *e)
{
	if (!(e->known & TDB_K_ADDR))
		return false;
	for (uint32_t id = m->mine[e->cpu].head; id != NONE; id = m->frames.node[id].mine.next) {
		const struct tdb_frame *f = &m->frames.node[id].f;

		if (f->status == TDB_FRAME_LIVE && (f->lo == e->addr || frame_rip_addr(f) == e->addr))
			return touches(w, e->addr, f->hi - e->addr);
	}
	return false;
}

/* What the next event takes from the watched bytes, in the state before it. */
static uint8_t taken(const struct machine *m, const struct tdb_watch *w, const struct tdb_event *e)
{
	bool far = e->flags & TDB_F_BYTES;

	if (!(e->known & TDB_K_CPU) || e->cpu >= m->in->cpus)
		return 0;
	switch (e->kind) {
	case TDB_READ:
		if (e->known & TDB_K_ADDR && e->known & (far ? TDB_K_CODE : TDB_K_ARG) &&
		    touches(w, e->addr, far ? e->code : e->arg))
			return TDB_TOUCH_READ;
		return 0;
	case TDB_RETURN:
		return pops(m, w, e) ? TDB_TOUCH_POP : 0;
	case TDB_MOVE:
		return copies(m, w, e) ? TDB_TOUCH_COPY : 0;
	default:
		return 0;
	}
}

static const struct node *open_frame(const struct machine *m, uint32_t entry)
{
	for (uint32_t id = m->frames.age.head; id != NONE; id = m->frames.node[id].age.next)
		if (m->frames.node[id].f.entry == entry)
			return &m->frames.node[id];
	return NULL;
}

static bool valid(const tdb_replay *r, const struct tdb_watch *w)
{
	uint32_t bytes = TDB_TOUCH_WRITE | TDB_TOUCH_READ | TDB_TOUCH_POP | TDB_TOUCH_COPY;

	if (!w || !w->touch || w->touch & ~(bytes | TDB_TOUCH_END))
		return false;
	if (w->touch & bytes && (w->lo >= w->hi || w->hi - w->lo > WATCH_LIMIT))
		return false;
	return !(w->touch & TDB_TOUCH_END) || open_frame(&r->view, w->frame);
}

/* Apply the view's next event; *ret: what it did to what is watched. */
static int step(tdb_replay *r, const struct tdb_watch *w, uint64_t key, uint8_t *ret)
{
	struct machine *m = &r->view;
	uint32_t index = (uint32_t)m->position;
	uint8_t touch = w->touch & (TDB_TOUCH_READ | TDB_TOUCH_POP | TDB_TOUCH_COPY) ? taken(m, w, &r->in.events[index]) : 0;
	int status = machine_apply(m);

	if (status)
		return status;
	if (w->touch & TDB_TOUCH_WRITE && stored(m, w, index))
		touch |= TDB_TOUCH_WRITE;
	if (w->touch & TDB_TOUCH_END && !frame_of_entry(m, key, w->frame))
		touch |= TDB_TOUCH_END;
	*ret = touch & w->touch;
	return TDB_OK;
}

int64_t tdb_watch(tdb_replay *r, const struct tdb_watch *watch, uint64_t max, struct tdb_hit *ret, uint64_t cap)
{
	uint64_t key = 0;
	uint64_t n = 0;

	if (!valid(r, watch) || (!ret && cap))
		return TDB_E_ARG;
	if (r->broken)
		return r->broken;
	if (watch->touch & TDB_TOUCH_END)
		key = open_frame(&r->view, watch->frame)->key;
	while (max && n < cap && r->view.position < r->in.count) {
		uint8_t touch;
		uint32_t by;
		int status;

		if (r->view.position == r->scan.position) {        /* the view never runs ahead of the scan */
			int64_t done = tdb_scan(r, (max + 1) / 2);

			if (done < 0)
				return done;
			max -= (uint64_t)done;
			continue;
		}
		status = step(r, watch, key, &touch);
		if (status) {
			r->broken = status;
			return status;
		}
		max--;
		if (!touch)
			continue;
		ret[n] = (struct tdb_hit){ .event = (uint32_t)r->view.position - 1, .touch = touch };
		memory_load(&r->view.mem, watch->lo, &ret[n].value, &ret[n].known, &by);
		n++;
		if (touch & TDB_TOUCH_END)
			break;
	}
	return (int64_t)n;
}

int64_t tdb_find_time(const tdb_replay *r, uint64_t from, uint64_t time, uint64_t max)
{
	uint64_t end;

	if (from >= r->in.count)
		return TDB_E_RANGE;
	end = max < r->in.count - from ? from + max : r->in.count;
	for (uint64_t i = from; i < end; i++)
		if (r->in.events[i].known & TDB_K_TIME && r->in.events[i].time >= time)
			return (int64_t)i;
	return TDB_E_RANGE;
}
