/* view.c - reading the state of the view and the results of the scan. */
#include <stdlib.h>

#include "core.h"

int tdb_get_cpu(const tdb_replay *r, uint32_t cpu, struct tdb_cpu *ret)
{
	if (cpu >= r->in.cpus)
		return TDB_E_RANGE;
	*ret = r->view.cpu[cpu].s;
	return TDB_OK;
}

int tdb_get_tss(const tdb_replay *r, uint32_t cpu, struct tdb_tss *ret)
{
	if (cpu >= r->in.cpus || r->view.cpu[cpu].s.tss < 0)
		return TDB_E_RANGE;
	*ret = r->view.tss[r->view.cpu[cpu].s.tss];
	return TDB_OK;
}

int tdb_get_gate(const tdb_replay *r, uint32_t cpu, uint32_t vector, struct tdb_gate *ret)
{
	if (cpu >= r->in.cpus || vector > 255 || r->view.cpu[cpu].s.idt < 0)
		return TDB_E_RANGE;
	*ret = r->view.idt[r->view.cpu[cpu].s.idt]->gate[vector];
	return TDB_OK;
}

static int compare_addresses(const void *a, const void *b)
{
	const struct tdb_stack *x = a, *y = b;

	if (x->lo != y->lo)
		return x->lo < y->lo ? -1 : 1;
	if (x->hi != y->hi)
		return x->hi < y->hi ? -1 : 1;
	return x->slot < y->slot ? -1 : x->slot > y->slot;
}

int64_t tdb_get_stacks(const tdb_replay *r, struct tdb_stack *ret, uint64_t cap)
{
	const struct frames *fr = &r->view.frames;
	uint64_t total = r->in.stack_count + fr->anon_count, n = 0;
	struct tdb_stack *all;

	if (!cap)
		return (int64_t)total;
	all = malloc((total + 1) * sizeof(*all));
	if (!all)
		return TDB_E_NOMEM;
	for (uint32_t i = 0; i < r->in.stack_count; i++) {
		all[n] = r->in.stack[i];
		all[n++].frames = fr->named[i].count;
	}
	for (uint32_t i = 0; i < fr->anon_capacity; i++) {
		const struct anon *a = &fr->anon[i];

		if (!a->list.count)
			continue;
		all[n] = (struct tdb_stack){ .frames = a->list.count, .cpu = fr->node[a->list.head].f.cpu };
		stack_bounds(&r->in, a->key, &all[n].lo, &all[n].hi);
		n++;
	}
	qsort(all, total, sizeof(*all), compare_addresses);
	memcpy(ret, all, (total < cap ? total : cap) * sizeof(*all));
	free(all);
	return (int64_t)total;
}

int64_t tdb_get_frames(const tdb_replay *r, struct tdb_frame *ret, uint64_t cap)
{
	const struct frames *fr = &r->view.frames;
	uint64_t n = 0;

	for (uint32_t id = fr->age.tail; id != NONE && n < cap; id = fr->node[id].age.prev)
		ret[n++] = fr->node[id].f;
	return fr->count;
}

static bool word_used(const struct page *page, uint32_t word)
{
	return page->known[word] || page->writer[word] != NONE;
}

static void fill_word(const struct page *page, uint32_t word, struct tdb_word *ret)
{
	memset(ret, 0, sizeof(*ret));
	ret->addr = (page->index << PAGE_SHIFT) + word * 8;
	ret->known = page->known[word];
	for (uint32_t b = 0; b < 8; b++) {
		ret->writer[b] = page_writer(page, word, b);
		if (ret->known >> b & 1)
			ret->value |= page->value[word] & 0xffull << (8 * b);
	}
}

static int compare_pages(const void *a, const void *b)
{
	const struct page *x = *(const struct page *const *)a, *y = *(const struct page *const *)b;

	return x->index < y->index ? -1 : x->index > y->index;
}

int64_t tdb_get_words(const tdb_replay *r, uint64_t lo, uint64_t hi, struct tdb_word *ret, uint64_t cap)
{
	const struct memory *mem = &r->view.mem;
	const struct page **page = malloc((mem->count + 1) * sizeof(*page));
	uint64_t total = 0;
	uint32_t n = 0;

	if (!page)
		return TDB_E_NOMEM;
	lo &= ~7ull;
	for (uint32_t i = 0; i < mem->capacity; i++)
		if (mem->slot[i] && hi && mem->slot[i]->index >= lo >> PAGE_SHIFT &&
		    mem->slot[i]->index <= (hi - 1) >> PAGE_SHIFT)
			page[n++] = mem->slot[i];
	qsort(page, n, sizeof(*page), compare_pages);
	for (uint32_t i = 0; i < n; i++) {
		for (uint32_t w = 0; w < PAGE_WORDS; w++) {
			uint64_t addr = (page[i]->index << PAGE_SHIFT) + w * 8;

			if (addr < lo || addr >= hi || !word_used(page[i], w))
				continue;
			if (total < cap)
				fill_word(page[i], w, &ret[total]);
			total++;
		}
	}
	free(page);
	return (int64_t)total;
}

int64_t tdb_get_findings(const tdb_replay *r, uint64_t first, struct tdb_finding *ret, uint64_t cap)
{
	for (uint64_t i = 0; i < cap && first + i < r->findings.count; i++)
		ret[i] = r->findings.item[first + i];
	return r->findings.count;
}

int64_t tdb_findings_raised(const tdb_replay *r)
{
	return r->view.finding_count < r->findings.count ? r->view.finding_count : r->findings.count;
}

int tdb_get_last_frame(const tdb_replay *r, struct tdb_frame *ret)
{
	const struct node *n = frame_at(&r->view, r->view.frames.age.head);   /* what the last event opened is the newest */

	if (!n || n->f.entry + 1ull != r->view.position)
		return TDB_E_RANGE;
	*ret = n->f;
	return TDB_OK;
}

int tdb_get_stats(const tdb_replay *r, struct tdb_stats *ret)
{
	const struct machine *m = &r->scan;

	*ret = m->stats;
	ret->findings = m->finding_count;
	ret->pages_forgotten = m->mem.forgotten;
	ret->snapshots = r->snapshots.count;
	ret->interval = r->snapshots.interval;
	ret->pages = m->mem.count;
	ret->frames = m->frames.count;
	ret->bytes = r->page_bytes + r->snapshots.own_bytes;
	for (uint32_t id = m->frames.age.head; id != NONE; id = m->frames.node[id].age.next)
		ret->open_at_end += m->frames.node[id].f.status == TDB_FRAME_CLOBBERED;
	return TDB_OK;
}
