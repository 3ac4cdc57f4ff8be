/* frame.c - the open frames: a pool with lists by stack, by CPU (those on IST or per-CPU stacks) and by age. */
#include <stdlib.h>

#include "core.h"

static const struct list empty_list = { NONE, NONE, 0 };

/* -- lists ------------------------------------------------------------------------------------------------------- */

#define DEFINE_LIST(field) \
static void field##_push(struct frames *fr, struct list *l, uint32_t id) \
{ \
	fr->node[id].field = (struct link){ NONE, l->head }; \
	if (l->head != NONE) \
		fr->node[l->head].field.prev = id; \
	else \
		l->tail = id; \
	l->head = id; \
	l->count++; \
} \
static void field##_remove(struct frames *fr, struct list *l, uint32_t id) \
{ \
	struct link at = fr->node[id].field; \
	if (at.prev != NONE) \
		fr->node[at.prev].field.next = at.next; \
	else \
		l->head = at.next; \
	if (at.next != NONE) \
		fr->node[at.next].field.prev = at.prev; \
	else \
		l->tail = at.prev; \
	l->count--; \
}

DEFINE_LIST(stack)
DEFINE_LIST(age)
DEFINE_LIST(watch)
DEFINE_LIST(mine)

/* -- lists of the stacks without a name --------------------------------------------------------------------------- */

static struct anon *find_anon(struct anon *anon, uint32_t capacity, uint64_t key, uint64_t seed)
{
	uint32_t at = mix(key, seed) & (capacity - 1);

	while (anon[at].list.count && anon[at].key != key)
		at = (at + 1) & (capacity - 1);
	return &anon[at];
}

static int grow_anon(struct frames *fr)
{
	uint32_t capacity = fr->anon_capacity * 2;
	struct anon *anon = calloc(capacity, sizeof(*anon));

	if (!anon)
		return TDB_E_NOMEM;
	for (uint32_t i = 0; i < fr->anon_capacity; i++)
		if (fr->anon[i].list.count)
			*find_anon(anon, capacity, fr->anon[i].key, fr->seed) = fr->anon[i];
	free(fr->anon);
	fr->anon = anon;
	fr->anon_capacity = capacity;
	return TDB_OK;
}

/* Close the hole so that linear probing still finds what was pushed past it. */
static void remove_anon(struct frames *fr, struct anon *hole)
{
	uint32_t mask = fr->anon_capacity - 1, i = (uint32_t)(hole - fr->anon), j = i;

	fr->anon_count--;
	for (;;) {
		uint32_t home;

		j = (j + 1) & mask;
		if (!fr->anon[j].list.count)
			break;
		home = mix(fr->anon[j].key, fr->seed) & mask;
		if (((j - home) & mask) >= ((j - i) & mask)) {
			fr->anon[i] = fr->anon[j];
			i = j;
		}
	}
	fr->anon[i].list.count = 0;
}

struct list *frames_on(const struct frames *fr, uint64_t key)
{
	struct anon *anon;

	if (stack_named(key))
		return &fr->named[key];
	anon = find_anon(fr->anon, fr->anon_capacity, key, fr->seed);
	return anon->list.count ? &anon->list : (struct list *)&empty_list;
}

/* -- the pool ------------------------------------------------------------------------------------------------------- */

int frames_init(struct frames *fr, const struct inputs *in)
{
	*fr = (struct frames){ .free = NONE, .limit = in->cfg.max_frames, .age = empty_list,
			       .capacity = 64, .anon_capacity = 64, .seed = (uintptr_t)in };
	fr->node = calloc(fr->capacity, sizeof(*fr->node));
	fr->anon = calloc(fr->anon_capacity, sizeof(*fr->anon));
	fr->named = malloc((in->stack_count + 1) * sizeof(*fr->named));
	if (!fr->node || !fr->anon || !fr->named) {
		frames_deinit(fr);
		return TDB_E_NOMEM;
	}
	for (uint32_t i = 0; i < in->stack_count; i++)
		fr->named[i] = empty_list;
	return TDB_OK;
}

void frames_deinit(struct frames *fr)
{
	free(fr->node);
	free(fr->anon);
	free(fr->named);
	fr->node = NULL;
	fr->anon = NULL;
	fr->named = NULL;
}

void frames_reset(struct machine *m)
{
	struct frames *fr = &m->frames;

	fr->used = fr->count = 0;
	fr->free = NONE;
	fr->age = empty_list;
	for (uint32_t i = 0; i < m->in->stack_count; i++)
		fr->named[i] = empty_list;
	memset(fr->anon, 0, fr->anon_capacity * sizeof(*fr->anon));
	fr->anon_count = 0;
	for (uint32_t i = 0; i < m->in->cpus; i++)
		m->watch[i] = m->mine[i] = empty_list;
}

static int take_node(struct frames *fr, uint32_t *ret)
{
	if (fr->free != NONE) {
		*ret = fr->free;
		fr->free = fr->node[*ret].age.next;
		return TDB_OK;
	}
	if (fr->used == fr->capacity) {
		struct node *node = realloc(fr->node, (size_t)fr->capacity * 2 * sizeof(*node));

		if (!node)
			return TDB_E_NOMEM;
		fr->node = node;
		fr->capacity *= 2;
	}
	*ret = fr->used++;
	return TDB_OK;
}

int frame_open(struct machine *m, const struct tdb_frame *f, uint64_t key)
{
	struct frames *fr = &m->frames;
	struct list *list = frames_on(fr, key);
	struct node *n;
	uint32_t id;
	bool watched;
	int status;

	if (list->count >= FRAMES_PER_STACK)
		frame_close(m, &fr->node[list->tail], TDB_SETTLE_DROPPED);
	if (fr->count >= fr->limit)
		frame_close(m, &fr->node[fr->age.tail], TDB_SETTLE_DROPPED);
	watched = frame_dedicated(f) || stack_per_cpu(m->in, key);
	if (watched && m->watch[f->cpu].count >= WATCHED_PER_CPU)
		frame_close(m, &fr->node[m->watch[f->cpu].tail], TDB_SETTLE_DROPPED);
	if (!stack_named(key) && (fr->anon_count + 1) * 2 > fr->anon_capacity) {
		status = grow_anon(fr);
		if (status)
			return status;
	}
	status = take_node(fr, &id);
	if (status)
		return status;
	if (stack_named(key)) {
		list = &fr->named[key];
	} else {
		struct anon *anon = find_anon(fr->anon, fr->anon_capacity, key, fr->seed);

		if (!anon->list.count) {
			*anon = (struct anon){ key, empty_list };
			fr->anon_count++;
		}
		list = &anon->list;
	}
	n = &fr->node[id];
	n->f = *f;
	m->any_fred |= f->fred;
	n->key = key;
	n->saved_key = saved_knows(f, TDB_K_RSP) ? stack_key(m->in, f->saved.rsp) : 0;
	n->watched = watched;
	n->mark = NONE;
	stack_push(fr, list, id);
	age_push(fr, &fr->age, id);
	mine_push(fr, &m->mine[f->cpu], id);
	if (n->watched)
		watch_push(fr, &m->watch[f->cpu], id);
	fr->count++;
	return TDB_OK;
}

void frame_close(struct machine *m, struct node *n, enum tdb_settle why)
{
	struct frames *fr = &m->frames;
	uint32_t id = (uint32_t)(n - fr->node);

	if (frame_dedicated(&n->f))
		m->stats.settled[why]++;
	if (why == TDB_SETTLE_DROPPED && n->f.status == TDB_FRAME_CLOBBERED)
		finding_lost(m, n->f.finding, (uint32_t)(m->position - 1));
	if (unlikely(m->journal != NULL))
		journal_end(m->journal, &n->f, (uint32_t)(m->position - 1), why);
	if (stack_named(n->key)) {
		stack_remove(fr, &fr->named[n->key], id);
	} else {
		struct anon *anon = find_anon(fr->anon, fr->anon_capacity, n->key, fr->seed);

		stack_remove(fr, &anon->list, id);
		if (!anon->list.count)
			remove_anon(fr, anon);
	}
	age_remove(fr, &fr->age, id);
	mine_remove(fr, &m->mine[n->f.cpu], id);
	if (n->watched)
		watch_remove(fr, &m->watch[n->f.cpu], id);
	n->age.next = fr->free;
	fr->free = id;
	fr->count--;
}

struct node *frame_of_entry(const struct machine *m, uint64_t key, uint32_t entry)
{
	for (uint32_t id = frames_on(&m->frames, key)->head; id != NONE; id = m->frames.node[id].stack.next)
		if (m->frames.node[id].f.entry == entry)
			return &m->frames.node[id];
	return NULL;
}
