/* chain.c - frames that must be live because each one's context leads to the next, where no return is recorded. */
#include "core.h"

static struct node *nearest_above(const struct machine *m, uint16_t cpu, uint64_t cur)
{
	uint64_t key = stack_key(m->in, cur);
	struct node *best = NULL;

	for (uint32_t id = frames_on(&m->frames, key)->head; id != NONE; id = m->frames.node[id].stack.next) {
		struct node *n = frame_at(m, id);

		if (stack_named(key) && n->f.cpu != cpu)
			continue;
		if (frame_rip_addr(&n->f) < cur)
			continue;
		if (!best || frame_rip_addr(&n->f) < frame_rip_addr(&best->f))
			best = n;
	}
	return best;
}

/* After an IST reset the newest frame's saved RSP lies in its own stack: what it interrupted goes on at its victim. */
static struct node *past_resets(struct machine *m, struct node *n, uint32_t mark)
{
	while (saved_knows(&n->f, TDB_K_RSP) && n->saved_key == n->key && n->f.saved.rsp <= frame_rip_addr(&n->f) &&
	       n->f.victim != NONE) {
		struct node *victim = frame_of_entry(m, n->key, n->f.victim);

		if (!victim || victim->mark == mark)
			return NULL;
		victim->mark = mark;
		n = victim;
	}
	return n;
}

bool on_chain(const struct machine *m, uint16_t cpu, uint64_t cur, uint32_t entry)
{
	for (int i = 0; i < CHAIN_LIMIT; i++) {
		const struct node *n = nearest_above(m, cpu, cur);

		if (!n)
			return false;
		/* As in past_resets(); a victim is older than what overwrote it, so this ends. */
		while (n->f.entry != entry && saved_knows(&n->f, TDB_K_RSP) && n->saved_key == n->key &&
		       n->f.saved.rsp <= frame_rip_addr(&n->f) && n->f.victim != NONE) {
			n = frame_of_entry(m, n->key, n->f.victim);
			if (!n)
				return false;
		}
		if (n->f.entry == entry)
			return true;
		if (!saved_knows(&n->f, TDB_K_CS | TDB_K_RSP) || n->f.saved.cs & 3)
			return false;
		cur = n->f.saved.rsp;
	}
	return false;
}

void mark_chain(struct machine *m, uint16_t cpu, uint64_t cur, uint32_t mark)
{
	for (int i = 0; i < CHAIN_LIMIT; i++) {
		struct node *n = nearest_above(m, cpu, cur);

		if (!n || n->mark == mark)
			return;
		n->mark = mark;
		n = past_resets(m, n, mark);
		if (!n || !saved_knows(&n->f, TDB_K_CS | TDB_K_RSP) || n->f.saved.cs & 3)
			return;
		cur = n->f.saved.rsp;
	}
}
