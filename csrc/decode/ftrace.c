/*
 * ftrace.c - ring-buffer pages of Linux into native events.
 *
 * Page (include/linux/ring_buffer.h, kernel/trace/ring_buffer.c): u64 time, long commit (bytes used in 26:0, bit 31: records
 * were lost before the page, bit 30: their number stands behind the data), data.  A record begins with a word: type or length
 * in 4:0, time since the last one in 31:5.
 */
#include "ftrace_private.h"

enum {
	TYPE_PADDING = 29, TYPE_EXTEND = 30, TYPE_STAMP = 31,
	ROOM = 4                         /* events that one step puts into a queue, at most */
};

#define USED_MASK 0x7ffffffU
#define MISSED 0x80000000U
#define STORED 0x40000000U
#define STAMP_TOP (0xf8ULL << 56)        /* an absolute time has 59 bits */

enum fill { FILL_READY, FILL_DATA, FILL_ASK, FILL_END };

static void damaged(struct ftr_state *s, struct ftr_stream *st)
{
	if (s->damages < FTR_DAMAGES) {
		s->damage[s->damages].at = st->base + st->at - st->page_size;
		s->damage[s->damages++].stream = (uint32_t)(st - s->stream);
	}
	s->count[FTR_C_DAMAGED]++;
	ftr_gap(s, st, UINT64_MAX);
	st->next = st->end;
}

static void open_page(struct ftr_state *s, struct ftr_stream *st)
{
	const uint8_t *page = st->data + st->at;
	uint64_t commit = s->long_size == 8 ? get64(page + s->commit_at) : get32(page + s->commit_at);
	uint32_t used = commit & USED_MASK, room = st->page_size - s->data_at;

	st->at += st->page_size;
	st->next = st->end = page + s->data_at;
	if (used > room) {
		damaged(s, st);
		return;
	}
	st->time = get64(page);
	st->end += used;
	if (commit & MISSED) {
		if (!(commit & STORED) || room - used < s->long_size)
			ftr_gap(s, st, UINT64_MAX);
		else
			ftr_gap(s, st, s->long_size == 8 ? get64(st->end) : get32(st->end));
	}
}

/* The next record of the page; whether the caller is to complete it. */
static int step(struct ftr_state *s, struct ftr_stream *st)
{
	const uint8_t *p = st->next;
	uint64_t left = (uint64_t)(st->end - p), stamp, size, whole;
	uint32_t word, type, delta, extra = 0;

	if (left < 4) {
		damaged(s, st);
		return 0;
	}
	word = get32(p);
	type = word & 31;
	delta = word >> 5;
	p += 4;
	left -= 4;
	if (type == TYPE_PADDING && !delta) {
		st->next = st->end;
		return 0;
	}
	if (type == 0 || type >= TYPE_PADDING) {
		if (left < 4) {
			damaged(s, st);
			return 0;
		}
		extra = get32(p);
	}
	switch (type) {
	case TYPE_PADDING:   /* a record that was taken back; its time counts */
		if (extra < 4 || extra > left) {
			damaged(s, st);
			return 0;
		}
		st->time += delta;
		st->next = p + extra;
		return 0;
	case TYPE_EXTEND:
		st->time += ((uint64_t)extra << 27) + delta;
		st->next = p + 4;
		return 0;
	case TYPE_STAMP:
		stamp = ((uint64_t)extra << 27) + delta;
		if (st->time & STAMP_TOP) {
			stamp |= st->time & STAMP_TOP;
			if (stamp < st->time)   /* its 59 bits began anew */
				stamp += 1ULL << 59;
		}
		st->time = stamp;
		st->next = p + 4;
		return 0;
	case 0:
		size = (uint64_t)extra - 4;
		whole = (size + 3) & ~3ULL;
		p += 4;
		left -= 4;
		if (extra < 4 || whole > left) {
			damaged(s, st);
			return 0;
		}
		break;
	default:
		size = whole = type * 4U;
		if (whole > left) {
			damaged(s, st);
			return 0;
		}
		break;
	}
	st->time += delta;
	st->next = p + whole;
	return ftr_record(s, st, p, (uint32_t)size);
}

static enum fill fill(struct ftr_state *s, struct ftr_stream *st)
{
	for (;;) {
		if (st->queued && st->queued + ROOM > FTR_QUEUE)
			ftr_release(s, st);
		if (st->queued && (st->held == FTR_NONE || st->head != st->held))
			return FILL_READY;
		if (st->next < st->end) {
			if (step(s, st))
				return FILL_ASK;
		} else if (st->size - st->at >= st->page_size) {
			open_page(s, st);
		} else if (!st->last) {
			return FILL_DATA;
		} else if (st->cut) {
			st->cut = 0;
			ftr_gap(s, st, UINT64_MAX);
		} else if (st->held != FTR_NONE) {
			ftr_release(s, st);
		} else {
			return FILL_END;
		}
	}
}

/* -- several streams ------------------------------------------------------------------------------------------------------- */

static int before(const struct ftr_state *s, uint32_t a, uint32_t b)
{
	uint64_t x = s->stream[a].queue[s->stream[a].head][0], y = s->stream[b].queue[s->stream[b].head][0];

	return x < y || (x == y && a < b);
}

static void sift_down(struct ftr_state *s)
{
	uint32_t i = 0, child, n = s->waiting, what = s->heap[0];

	for (;;) {
		child = 2 * i + 1;
		if (child >= n)
			break;
		if (child + 1 < n && before(s, s->heap[child + 1], s->heap[child]))
			child++;
		if (!before(s, s->heap[child], what))
			break;
		s->heap[i] = s->heap[child];
		i = child;
	}
	s->heap[i] = what;
}

static void insert(struct ftr_state *s, uint32_t what)
{
	uint32_t i = s->waiting++;

	while (i && before(s, what, s->heap[(i - 1) / 2])) {
		s->heap[i] = s->heap[(i - 1) / 2];
		i = (i - 1) / 2;
	}
	s->heap[i] = what;
}

/* The first stream of the heap has no event at hand: get one.  Whether ftr_run() goes on. */
static int refill(struct ftr_state *s)
{
	enum fill how = fill(s, &s->stream[s->heap[0]]);

	switch (how) {
	case FILL_END:
		s->heap[0] = s->heap[--s->waiting];
		if (s->waiting)
			sift_down(s);
		return 1;
	case FILL_READY:
		sift_down(s);
		return 1;
	case FILL_DATA:
	case FILL_ASK:
		break;
	}
	s->stream_wanted = s->heap[0];
	return 0;
}

static int prime(struct ftr_state *s)
{
	for (; s->primed < s->streams; s->primed++) {
		switch (fill(s, &s->stream[s->primed])) {
		case FILL_READY: insert(s, s->primed); break;
		case FILL_END: break;
		case FILL_DATA:
		case FILL_ASK:
			s->stream_wanted = s->primed;
			return 0;
		}
	}
	return 1;
}

static int sound(const struct ftr_state *s)
{
	uint64_t least = (uint64_t)s->commit_at + s->long_size;
	uint32_t i;

	for (i = 0; i < s->streams; i++)
		if (s->stream[i].page_size < 16 || s->data_at > s->stream[i].page_size || least > s->stream[i].page_size)
			return 0;
	return 1;
}

int64_t ftr_run(struct ftr_state *s, void *ret, uint64_t cap)
{
	uint8_t *out = ret;
	uint64_t n = 0;
	struct ftr_stream *st;
	int came_back;

	if (!s || !ret || !s->stream || !s->point || !s->points || !s->number || s->streams > FTR_MAX_STREAMS ||
	    (s->long_size != 4 && s->long_size != 8) || (!s->primed && !sound(s)))
		return DEC_E_ARG;
	came_back = s->primed == s->streams && s->stream_wanted != FTR_NONE && s->waiting;
	s->stream_wanted = s->point_asked = FTR_NONE;
	if (!prime(s) || (came_back && !refill(s)))
		return 0;
	while (s->waiting && n < cap) {
		st = &s->stream[s->heap[0]];
		memcpy(out + n++ * sizeof(struct tdb_event), st->queue[st->head], sizeof(struct tdb_event));
		st->head = (st->head + 1) % FTR_QUEUE;
		st->queued--;
		if (!refill(s))
			break;
	}
	return (int64_t)n;
}

int ftr_answer(struct ftr_state *s, uint64_t value, uint32_t code)
{
	struct tdb_event e;
	struct ftr_stream *st;
	void *last;

	if (!s || s->stream_wanted >= s->streams || s->point_asked == FTR_NONE)
		return DEC_E_ARG;
	st = &s->stream[s->stream_wanted];
	if (!st->queued)
		return DEC_E_ARG;
	last = st->queue[(st->head + st->queued - 1) % FTR_QUEUE];
	memcpy(&e, last, sizeof(e));
	ftr_complete(&e, value, code);
	if (s->asked.point) {
		s->asked.value = value;
		s->asked.code = code;
		s->answer[ftr_answer_slot(&s->asked)] = s->asked;
	}
	memcpy(last, &e, sizeof(e));
	return DEC_OK;
}
