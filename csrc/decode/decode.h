/*
 * decode.h - what the decoders of foreign binary traces have in common (tracedbg._decode).
 *
 * A decoder turns records of a source into native events (struct tdb_event of tdb.h), 64 bytes each, in a buffer of the
 * caller.  It holds no tables of its own: which record becomes which event is data that its Python module hands over.
 *
 * Rules of the interface
 *   - No globals, threads or callbacks; a decoder's state is a struct of the caller, zeroed at first.
 *   - Functions return a value >= 0 on success and a negative enum dec_status on failure.
 *   - The input is hostile: every length is checked before a byte is read, every loop ends.
 */
#ifndef TRACEDBG_DECODE_H
#define TRACEDBG_DECODE_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
enum dec_status {
	DEC_OK = 0,
	DEC_E_ARG = -1,    /* an argument is NULL or out of range */
	DEC_E_FORMAT = -2  /* the bytes are not of this format; the state says where */
};

struct tdb_event;      /* of tdb.h: 64 bytes */

/* cffi: end */

#endif
