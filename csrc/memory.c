/* memory.c - sparse stack memory with the writer of every byte, in pages that snapshots share. */
#include <stdlib.h>

#include "core.h"

#define SPLIT_BYTES (PAGE_WORDS * sizeof(uint32_t[8]))

static void page_release(struct memory *mem, struct page *page)
{
	if (--page->refs)
		return;
	*mem->bytes -= sizeof(*page) + (page->split ? SPLIT_BYTES : 0);
	free(page->split);
	free(page);
}

static struct page *page_new(struct memory *mem, uint64_t index)
{
	struct page *page = calloc(1, sizeof(*page));

	if (!page)
		return NULL;
	page->refs = 1;
	page->index = index;
	memset(page->writer, 0xff, sizeof(page->writer));
	*mem->bytes += sizeof(*page);
	return page;
}

static struct page *page_clone(struct memory *mem, const struct page *from)
{
	struct page *page = malloc(sizeof(*page));

	if (!page)
		return NULL;
	*page = *from;
	page->refs = 1;
	if (from->split) {
		page->split = malloc(SPLIT_BYTES);
		if (!page->split) {
			free(page);
			return NULL;
		}
		memcpy(page->split, from->split, SPLIT_BYTES);
	}
	*mem->bytes += sizeof(*page) + (page->split ? SPLIT_BYTES : 0);
	return page;
}

int memory_init(struct memory *mem, uint32_t limit, uint64_t seed, uint64_t *bytes)
{
	*mem = (struct memory){ .capacity = 64, .limit = limit, .seed = seed, .bytes = bytes };
	mem->slot = calloc(mem->capacity, sizeof(*mem->slot));
	return mem->slot ? TDB_OK : TDB_E_NOMEM;
}

void memory_deinit(struct memory *mem)
{
	for (uint32_t i = 0; mem->slot && i < mem->capacity; i++)
		if (mem->slot[i])
			page_release(mem, mem->slot[i]);
	free(mem->slot);
	mem->slot = NULL;
}

int memory_copy(struct memory *to, const struct memory *from)
{
	struct page **slot = malloc(from->capacity * sizeof(*slot));

	if (!slot)
		return TDB_E_NOMEM;
	memcpy(slot, from->slot, from->capacity * sizeof(*slot));
	for (uint32_t i = 0; i < from->capacity; i++)
		if (slot[i])
			slot[i]->refs++;
	*to = *from;
	to->slot = slot;
	return TDB_OK;
}

void memory_clear(struct memory *mem)
{
	for (uint32_t i = 0; mem->count && i < mem->capacity; i++) {
		if (mem->slot[i]) {
			page_release(mem, mem->slot[i]);
			mem->slot[i] = NULL;
			mem->count--;
		}
	}
	if (mem->capacity > 1024) {      /* or the next gap would walk all of it again */
		struct page **slot = calloc(64, sizeof(*slot));

		if (slot) {
			free(mem->slot);
			mem->slot = slot;
			mem->capacity = 64;
		}
	}
}

static struct page **find_slot(struct page **slot, uint32_t capacity, uint64_t index, uint64_t seed)
{
	uint32_t at = mix(index, seed) & (capacity - 1);

	while (slot[at] && slot[at]->index != index)
		at = (at + 1) & (capacity - 1);
	return &slot[at];
}

const struct page *memory_page(const struct memory *mem, uint64_t index)
{
	return *find_slot(mem->slot, mem->capacity, index, mem->seed);
}

static int rehash(struct memory *mem, uint32_t capacity)
{
	struct page **slot = calloc(capacity, sizeof(*slot));

	if (!slot)
		return TDB_E_NOMEM;
	for (uint32_t i = 0; i < mem->capacity; i++)
		if (mem->slot[i])
			*find_slot(slot, capacity, mem->slot[i]->index, mem->seed) = mem->slot[i];
	free(mem->slot);
	mem->slot = slot;
	mem->capacity = capacity;
	return TDB_OK;
}

static int compare_stamps(const void *a, const void *b)
{
	const struct page *x = *(struct page *const *)a, *y = *(struct page *const *)b;

	if (x->stamp != y->stamp)
		return x->stamp < y->stamp ? -1 : 1;
	return x->index < y->index ? -1 : x->index > y->index;
}

/* Forget the quarter of the pages that was written longest ago.  Depends on the state alone, so seeking repeats it. */
static int forget_oldest(struct memory *mem)
{
	struct page **all = malloc((size_t)mem->count * sizeof(*all));
	uint32_t n = 0, drop;

	if (!all)
		return TDB_E_NOMEM;
	for (uint32_t i = 0; i < mem->capacity; i++)
		if (mem->slot[i])
			all[n++] = mem->slot[i];
	qsort(all, n, sizeof(*all), compare_stamps);
	memset(mem->slot, 0, mem->capacity * sizeof(*mem->slot));
	drop = n / 4 + 1;
	for (uint32_t i = 0; i < n; i++) {
		if (i < drop)
			page_release(mem, all[i]);
		else
			*find_slot(mem->slot, mem->capacity, all[i]->index, mem->seed) = all[i];
	}
	mem->count = n - drop;
	mem->forgotten += drop;
	free(all);
	return TDB_OK;
}

/* The page for writing: made, or copied if a snapshot shares it. */
static struct page *writable(struct memory *mem, uint64_t index, uint32_t stamp)
{
	struct page **slot = find_slot(mem->slot, mem->capacity, index, mem->seed);
	struct page *page = *slot;

	if (unlikely(!page)) {
		if (mem->count >= mem->limit && forget_oldest(mem))
			return NULL;
		if ((mem->count + 1) * 2 > mem->capacity && rehash(mem, mem->capacity * 2))
			return NULL;
		page = page_new(mem, index);
		if (!page)
			return NULL;
		*find_slot(mem->slot, mem->capacity, index, mem->seed) = page;
		mem->count++;
	} else if (unlikely(page->refs > 1)) {
		struct page *copy = page_clone(mem, page);

		if (!copy)
			return NULL;
		page->refs--;
		*slot = page = copy;
	}
	if (stamp != NONE)
		page->stamp = stamp;
	return page;
}

uint32_t page_writer(const struct page *page, uint32_t word, uint32_t byte)
{
	return page->writer[word] == WRITER_SPLIT ? page->split[word][byte] : page->writer[word];
}

int memory_store_word(struct memory *mem, uint64_t addr, uint64_t value, uint8_t known, uint32_t writer)
{
	struct page *page = writable(mem, addr >> PAGE_SHIFT, writer);
	uint32_t word = addr >> 3 & (PAGE_WORDS - 1);

	if (unlikely(!page))
		return TDB_E_NOMEM;
	page->value[word] = value;
	page->known[word] = known;
	page->writer[word] = writer;
	return TDB_OK;
}

int memory_store_down(struct memory *mem, uint64_t top, const struct words *words, uint32_t writer)
{
	uint32_t count = words->count, word;
	struct page *page;

	if (unlikely((top - 8) >> PAGE_SHIFT != (top - 8 * count) >> PAGE_SHIFT)) {
		for (uint32_t i = 0; i < count; i++) {
			int status = memory_store_word(mem, top - 8 * (i + 1), words->value[i], words->known[i], writer);

			if (status)
				return status;
		}
		return TDB_OK;
	}
	page = writable(mem, (top - 8) >> PAGE_SHIFT, writer);
	if (unlikely(!page))
		return TDB_E_NOMEM;
	word = (top - 8) >> 3 & (PAGE_WORDS - 1);
	for (uint32_t i = 0; i < count; i++) {
		page->value[word - i] = words->value[i];
		page->known[word - i] = words->known[i];
		page->writer[word - i] = writer;
	}
	return TDB_OK;
}

static int store_part(struct memory *mem, uint64_t addr, const uint8_t *bytes, uint32_t length, uint32_t writer)
{
	struct page *page = writable(mem, addr >> PAGE_SHIFT, writer);
	uint32_t word = addr >> 3 & (PAGE_WORDS - 1), byte = addr & 7;

	if (!page)
		return TDB_E_NOMEM;
	if (page->writer[word] != writer && page->writer[word] != WRITER_SPLIT) {
		if (!page->split) {
			page->split = malloc(SPLIT_BYTES);
			if (!page->split)
				return TDB_E_NOMEM;
			*mem->bytes += SPLIT_BYTES;
		}
		for (uint32_t i = 0; i < 8; i++)
			page->split[word][i] = page->writer[word];
		page->writer[word] = WRITER_SPLIT;
	}
	for (uint32_t i = 0; i < length; i++) {
		uint32_t shift = 8 * (byte + i);

		page->value[word] &= ~(0xffull << shift);
		page->known[word] &= ~(1u << (byte + i));
		if (bytes) {
			page->value[word] |= (uint64_t)bytes[i] << shift;
			page->known[word] |= 1u << (byte + i);
		}
		if (page->writer[word] == WRITER_SPLIT)
			page->split[word][byte + i] = writer;
	}
	return TDB_OK;
}

int memory_store(struct memory *mem, uint64_t addr, const uint8_t *bytes, uint32_t length, uint32_t writer)
{
	if (length && addr + (length - 1) < addr)
		length = (uint32_t)(0 - addr);
	while (length) {
		uint32_t room = 8 - (addr & 7), part = length < room ? length : room;
		int status;

		if (part == 8) {
			uint64_t value = 0;

			if (bytes)
				memcpy(&value, bytes, 8);
			status = memory_store_word(mem, addr, bytes ? value : 0, bytes ? 0xff : 0, writer);
		} else {
			status = store_part(mem, addr, bytes, part, writer);
		}
		if (status)
			return status;
		addr += part;
		bytes = bytes ? bytes + part : NULL;
		length -= part;
	}
	return TDB_OK;
}

void memory_load(const struct memory *mem, uint64_t addr, uint64_t *value, uint8_t *known, uint32_t *writer)
{
	*value = 0;
	*known = 0;
	*writer = NONE;
	for (uint32_t i = 0; i < 8; i++) {
		uint64_t a = addr + i;
		const struct page *page = memory_page(mem, a >> PAGE_SHIFT);
		uint32_t word = a >> 3 & (PAGE_WORDS - 1), byte = a & 7;

		if (!page)
			continue;
		if (i == 0)
			*writer = page_writer(page, word, byte);
		if (page->known[word] >> byte & 1) {
			*known |= 1u << i;
			*value |= (page->value[word] >> (8 * byte) & 0xff) << (8 * i);
		}
	}
}
