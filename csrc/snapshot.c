/* snapshot.c - copies of the scan's state at intervals; stack pages and gates are shared until written. */
#include <stdlib.h>

#include "core.h"

struct snapshot {
	uint64_t position;
	uint32_t finding_count;
	uint32_t frame_count;
	struct cpu *cpu;
	struct tdb_tss *tss;
	struct gates **idt;
	uint32_t idt_count;
	struct memory mem;
	struct tdb_frame *frame;         /* in entry order */
	uint64_t own_bytes;              /* of all this but the pages */
};

static void snapshot_free(struct snapshot *s)
{
	if (!s)
		return;
	for (uint32_t i = 0; s->idt && i < s->idt_count; i++)
		if (s->idt[i] && !--s->idt[i]->refs)
			free(s->idt[i]);
	free(s->cpu);
	free(s->tss);
	free(s->idt);
	free(s->frame);
	memory_deinit(&s->mem);
	free(s);
}

static struct snapshot *snapshot_new(const struct machine *m)
{
	const struct inputs *in = m->in;
	struct snapshot *s = calloc(1, sizeof(*s));
	uint32_t n = 0;

	if (!s)
		return NULL;
	s->position = m->position;
	s->finding_count = m->finding_count;
	s->idt_count = in->idt_count;
	s->own_bytes = sizeof(*s) + in->cpus * sizeof(*s->cpu) + in->tss_count * sizeof(*s->tss) +
		       in->idt_count * (sizeof(*s->idt) + sizeof(struct gates)) + m->frames.count * sizeof(*s->frame) +
		       m->mem.capacity * sizeof(*m->mem.slot);
	s->frame_count = m->frames.count;
	s->cpu = malloc(in->cpus * sizeof(*s->cpu));
	s->tss = malloc((in->tss_count + 1) * sizeof(*s->tss));
	s->idt = calloc(in->idt_count + 1, sizeof(*s->idt));
	s->frame = malloc((s->frame_count + 1) * sizeof(*s->frame));
	if (!s->cpu || !s->tss || !s->idt || !s->frame || memory_copy(&s->mem, &m->mem)) {
		snapshot_free(s);
		return NULL;
	}
	memcpy(s->cpu, m->cpu, in->cpus * sizeof(*s->cpu));
	memcpy(s->tss, m->tss, in->tss_count * sizeof(*s->tss));
	for (uint32_t i = 0; i < in->idt_count; i++) {
		s->idt[i] = m->idt[i];
		s->idt[i]->refs++;
	}
	for (uint32_t id = m->frames.age.tail; id != NONE; id = m->frames.node[id].age.prev)
		s->frame[n++] = m->frames.node[id].f;
	return s;
}

int snapshots_init(struct snapshots *s, const struct tdb_config *cfg)
{
	*s = (struct snapshots){ .interval = cfg->snapshot_interval, .limit = cfg->max_snapshots, .max_bytes = cfg->max_bytes };
	s->item = calloc(s->limit, sizeof(*s->item));
	return s->item ? TDB_OK : TDB_E_NOMEM;
}

void snapshots_deinit(struct snapshots *s)
{
	for (uint32_t i = 0; s->item && i < s->count; i++)
		snapshot_free(s->item[i]);
	free(s->item);
	s->item = NULL;
}

/* Keep those at multiples of the doubled interval; the first one, at 0, always stays. */
static void thin_out(struct snapshots *s)
{
	uint32_t kept = 0;

	s->interval *= 2;
	for (uint32_t i = 0; i < s->count; i++) {
		if (s->item[i]->position % s->interval == 0) {
			s->item[kept++] = s->item[i];
		} else {
			s->own_bytes -= s->item[i]->own_bytes;
			snapshot_free(s->item[i]);
		}
	}
	s->count = kept;
}

static bool too_many(const struct snapshots *s, const struct machine *m)
{
	return s->count == s->limit || (s->count > 1 && s->own_bytes + *m->mem.bytes > s->max_bytes);
}

void snapshots_take(struct snapshots *s, const struct machine *m)
{
	struct snapshot *item;

	if (s->count && s->item[s->count - 1]->position >= m->position)
		return;
	while (too_many(s, m) && s->interval <= UINT32_MAX / 2)
		thin_out(s);
	if (m->position % s->interval || s->count == s->limit || (s->count && s->own_bytes + *m->mem.bytes > s->max_bytes))
		return;
	item = snapshot_new(m);
	if (!item)                       /* seeking there takes longer, that is all */
		return;
	s->own_bytes += item->own_bytes;
	s->item[s->count++] = item;
}

static const struct snapshot *newest(const struct snapshots *s, uint64_t position)
{
	uint32_t lo = 0, hi = s->count;

	while (lo < hi) {
		uint32_t mid = (lo + hi) / 2;

		if (s->item[mid]->position <= position)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo ? s->item[lo - 1] : NULL;
}

static int restore(const struct snapshot *s, struct machine *m)
{
	const struct inputs *in = m->in;
	struct memory mem;

	if (memory_copy(&mem, &s->mem))
		return TDB_E_NOMEM;
	memory_deinit(&m->mem);
	m->mem = mem;
	memcpy(m->cpu, s->cpu, in->cpus * sizeof(*m->cpu));
	memcpy(m->tss, s->tss, in->tss_count * sizeof(*m->tss));
	for (uint32_t i = 0; i < in->idt_count; i++) {
		s->idt[i]->refs++;
		if (!--m->idt[i]->refs)
			free(m->idt[i]);
		m->idt[i] = s->idt[i];
	}
	frames_reset(m);
	for (uint32_t i = 0; i < s->frame_count; i++) {
		int status = frame_open(m, &s->frame[i], stack_key(in, s->frame[i].hi));

		if (status)
			return status;
	}
	m->position = s->position;
	m->finding_count = s->finding_count;
	return TDB_OK;
}

int snapshots_restore(const struct snapshots *s, struct machine *m, uint64_t position)
{
	const struct snapshot *best = newest(s, position);

	if (m->position <= position && (!best || best->position <= m->position))
		return TDB_OK;
	return best ? restore(best, m) : TDB_E_RANGE;
}
