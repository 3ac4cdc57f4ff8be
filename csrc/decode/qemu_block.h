/* qemu_block.h - the text of one ordinary block of a QEMU log, and lines of trace events; private to the scanner. */
#ifndef TRACEDBG_QEMU_BLOCK_H
#define TRACEDBG_QEMU_BLOCK_H

#include <stdbool.h>
#include <stdint.h>

#include "cursor.h"

/* What one block says. */
struct block {
	uint64_t number, ip, sp, cr2, tr, idt, efer;
	int64_t time;
	int64_t old;    /* of a check_exception line; -1: there is none */
	uint32_t stamps, vector, code, cs, ss, rflags, digits, lines;
	int32_t served; /* vector of the Servicing line; -1: none */
	bool soft, smm, has_cr2;
};

/*
 * Read a block: a check_exception or Servicing line of its own vector, the `v=` line, the register dump.  False: it is torn,
 * cut short or in any way not as QEMU prints it; then c and b are of no use.  The caller sets the time before it.
 */
bool qemu_block_read(struct cursor *c, struct block *b);

/*
 * Read a line of a trace event that says nothing of who asked for an interrupt.  Its time, if later, goes to *time, the kind of
 * its stamp (enum qlog_stamp) to *stamps.  False: it is none; nothing has changed.
 */
bool qemu_block_trace(struct cursor *c, int64_t *time, uint32_t *stamps);

#endif
