/* journal.c - the life of every frame: what the forward scan notes of those that end, until somebody takes it. */
#include <stdlib.h>

#include "core.h"

/* The frame as it was stored: what happened to it since is told by the other fields. */
static void fill(struct tdb_life *l, const struct tdb_frame *f, uint32_t end, uint8_t settle)
{
	*l = (struct tdb_life){ .frame = *f, .end = end, .overwritten = f->overwritten_by, .finding = f->finding,
				.settle = settle, .status = f->status };
	l->frame.status = TDB_FRAME_LIVE;
	l->frame.hazards = 0;
	l->frame.clobbered_by = l->frame.overwritten_by = l->frame.finding = NONE;
}

void journal_end(struct journal *j, const struct tdb_frame *f, uint32_t event, enum tdb_settle why)
{
	if (j->count == j->capacity) {
		uint64_t capacity = j->capacity ? j->capacity * 2 : 1024;
		struct tdb_life *item = realloc(j->item, capacity * sizeof(*item));

		if (!item) {
			j->status = TDB_E_NOMEM;
			return;
		}
		j->item = item;
		j->capacity = capacity;
	}
	fill(&j->item[j->count++], f, event, (uint8_t)why);
}

void tdb_journal(tdb_replay *r, int on)
{
	free(r->journal.item);
	r->journal = (struct journal){ .status = TDB_OK };
	r->scan.journal = on ? &r->journal : NULL;
}

int64_t tdb_take_ended(tdb_replay *r, struct tdb_life *ret, uint64_t cap)
{
	struct journal *j = &r->journal;
	uint64_t left = j->count - j->taken, n = left < cap ? left : cap;

	if (!ret)
		return (int64_t)left;
	if (n)
		memcpy(ret, j->item + j->taken, n * sizeof(*ret));
	j->taken += n;
	if (j->taken == j->count)
		j->taken = j->count = 0;
	return (int64_t)n;
}

int64_t tdb_get_unended(const tdb_replay *r, struct tdb_life *ret, uint64_t cap)
{
	const struct frames *fr = &r->scan.frames;
	uint64_t n = 0;

	for (uint32_t id = fr->age.tail; id != NONE && n < cap; id = fr->node[id].age.prev)
		fill(&ret[n++], &fr->node[id].f, NONE, TDB_SETTLE_COUNT);
	return fr->count;
}
