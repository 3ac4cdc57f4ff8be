/* pt_internal.h - what the files of the Intel PT decoder share. */
#ifndef TRACEDBG_PT_INTERNAL_H
#define TRACEDBG_PT_INTERNAL_H

#include <stdbool.h>

#include "pt.h"
#include "tdb.h"

struct out {               /* where events go */
	struct pt_stream *s;
	const struct pt_text *text;
	struct tdb_event *event;
	uint64_t n;
};

/* pt_event.c */
/** Write the held event; false: its text is missing, nothing was written. */
bool pt_release(struct out *o);
/** Records are missing: nothing is known any more. */
void pt_emit_gap(struct out *o);
/** Damage here: a gap, and go on at the next PSB. */
void pt_lose(struct out *o, enum pt_damage what);
/** RFLAGS.IF as a MODE.Exec told it; at: the last address is where. */
void pt_emit_flags(struct out *o, bool at);

/* pt_bind.c */
/** Take one packet; false: a text is missing, nothing was done. */
bool pt_take(struct out *o, const struct pt_packet *p);

#endif
