/* digest.c - one number for the whole state of the view; tests/model.py computes the same one. */
#include <stdlib.h>

#include "core.h"

static void add(uint64_t *h, uint64_t value)           /* FNV-1a, 64 bit, over the little-endian bytes */
{
	for (int i = 0; i < 8; i++) {
		*h ^= value >> (8 * i) & 0xff;
		*h *= 0x100000001b3ull;
	}
}

static void add_cpu(uint64_t *h, const struct tdb_cpu *c)
{
	uint32_t k = c->known;

	add(h, k);
	add(h, k & TDB_CK_RIP ? c->rip : 0);
	add(h, k & TDB_CK_RSP ? c->rsp : 0);
	add(h, k & TDB_CK_CS ? c->cs : 0);
	add(h, k & TDB_CK_SS ? c->ss : 0);
	add(h, k & TDB_CK_RFLAGS ? c->rflags : 0);
	add(h, k & TDB_CK_USER_RSP ? c->user_rsp : 0);
	add(h, c->event);
	add(h, k & TDB_CK_NMI ? c->nmi_blocked : 0);
	add(h, c->nmi_pending);
	add(h, c->nmi_since);
	add(h, c->nmi_unblocked_by);
	add(h, c->nmi_unblock_frame);
	add(h, k & TDB_CK_MCIP ? c->mcip : 0);
	add(h, c->gap);
	add(h, (uint64_t)(int64_t)c->tss);
	add(h, (uint64_t)(int64_t)c->idt);
	add(h, c->ring_gap);
	add(h, k & TDB_CK_CSL ? c->csl : 0);
	add(h, k & TDB_CK_GS ? c->gs : 0);
	add(h, k & TDB_CK_TPR ? c->tpr : 0);
	add(h, k & TDB_CK_MCE ? c->mce : 0);
	add(h, k & TDB_CK_GIF ? c->gif : 0);
	add(h, c->fred);
	add(h, c->shadow);
	add(h, c->smm);
	add(h, c->guest);
	add(h, c->token_known);
	add(h, c->token_busy);
}

static void add_frame(uint64_t *h, const struct tdb_frame *f)
{
	const struct tdb_context *s = &f->saved;
	uint32_t k = s->known;

	add(h, f->entry);
	add(h, f->cpu);
	add(h, f->vector);
	add(h, f->source);
	add(h, f->ist);
	add(h, f->status);
	add(h, f->lo);
	add(h, f->hi);
	add(h, k & TDB_K_RIP ? s->rip : 0);
	add(h, k & TDB_K_CS ? s->cs : 0);
	add(h, k & TDB_K_RFLAGS ? s->rflags : 0);
	add(h, k & TDB_K_RSP ? s->rsp : 0);
	add(h, k & TDB_K_SS ? s->ss : 0);
	add(h, k & TDB_K_CODE ? s->code : 0);
	add(h, k);
	add(h, f->clobbered_by);
	add(h, f->victim);
	add(h, f->finding);
	add(h, f->fred);
	add(h, f->level);
	add(h, f->from_level);
	add(h, f->gs);
}

static void add_finding(uint64_t *h, const struct tdb_finding *f, uint64_t position)
{
	add(h, f->settled < position ? f->rule : f->raised_rule);
	add(h, f->evidence);
	add(h, f->cause);
	add(h, f->event);
	add(h, f->victim.entry);
	add(h, f->writer.entry);
	add(h, f->lo);
	add(h, f->hi);
	add(h, f->differ);
	add(h, f->cause_event);
	add(h, f->detail);
}

int tdb_digest(const tdb_replay *r, uint64_t *ret)
{
	const struct machine *m = &r->view;
	int64_t words = tdb_get_words(r, 0, UINT64_MAX, NULL, 0), raised = tdb_findings_raised(r);
	struct tdb_word *word;
	uint64_t h = 0xcbf29ce484222325ull;

	if (words < 0)
		return TDB_E_NOMEM;
	word = malloc(((size_t)words + 1) * sizeof(*word));
	if (!word)
		return TDB_E_NOMEM;
	if (tdb_get_words(r, 0, UINT64_MAX, word, (uint64_t)words) < 0) {
		free(word);
		return TDB_E_NOMEM;
	}
	for (uint32_t i = 0; i < r->in.cpus; i++)
		add_cpu(&h, &m->cpu[i].s);
	for (uint32_t id = m->frames.age.tail; id != NONE; id = m->frames.node[id].age.prev)
		add_frame(&h, &m->frames.node[id].f);
	for (int64_t i = 0; i < words; i++) {
		add(&h, word[i].addr);
		add(&h, word[i].value);
		add(&h, word[i].known);
		for (int b = 0; b < 8; b++)
			add(&h, word[i].writer[b]);
	}
	free(word);
	add(&h, (uint64_t)raised);
	for (int64_t i = 0; i < raised; i++)
		add_finding(&h, &r->findings.item[i], m->position);
	*ret = h;
	return TDB_OK;
}
