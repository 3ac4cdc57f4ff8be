"""The tables, views and indexes of an exported database. The comments stay in the file: `.schema` shows them.

64-bit values are SQLite's signed integers with the same bits: an address of the high half is negative there, and a literal
like 0xffff8300bffd2000 is that same number to SQLite. help/sqlite.md has the words for users.
"""

from __future__ import annotations

VERSION = 1
APPLICATION_ID = int.from_bytes(b"tdbg", "big")

TABLES = """\
CREATE TABLE trace ( -- one row
  schema_version INTEGER NOT NULL, -- of these tables; columns are added, never changed, within a version
  tool TEXT NOT NULL,
  events INTEGER NOT NULL,
  cpus INTEGER NOT NULL,
  clock_hz INTEGER, -- ticks a second of events.time; NULL: unknown
  unfinished INTEGER NOT NULL, -- 1: the writer of the trace did not finish it
  returns_recorded INTEGER NOT NULL, -- 1: every return of every CPU is in the trace
  ss_zeroed INTEGER NOT NULL, -- 1: the source zeroes SS on an IST switch (QEMU TCG)
  inferred INTEGER NOT NULL -- 1: the events are inferred from one instant (a dump)
) STRICT;

CREATE TABLE meta ( -- what the trace says of itself: fidelity (what its source cannot know), damage, source, layout ...
  name TEXT PRIMARY KEY,
  value TEXT NOT NULL -- a text as it is, all else as JSON
) STRICT, WITHOUT ROWID;

CREATE TABLE counts ( -- what the replay counted: deliveries, judged, unjudged, gaps, findings (kept or not) ...
  name TEXT PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE kinds ( -- of events
  kind INTEGER PRIMARY KEY, name TEXT NOT NULL
) STRICT;

CREATE TABLE sources ( -- of deliveries
  source INTEGER PRIMARY KEY, name TEXT NOT NULL
) STRICT;

CREATE TABLE settles ( -- why a frame ended
  settle INTEGER PRIMARY KEY, name TEXT NOT NULL, words TEXT NOT NULL
) STRICT;

CREATE TABLE statuses ( -- of a frame when it ended
  status INTEGER PRIMARY KEY, name TEXT NOT NULL
) STRICT;

CREATE TABLE names ( -- what deliveries are called: NMI, #PF, int 2 (fake NMI)
  vector INTEGER NOT NULL,
  source INTEGER NOT NULL,
  short INTEGER NOT NULL, -- 1: an INT of one byte (INT1, INT3, INTO)
  name TEXT NOT NULL,
  PRIMARY KEY (vector, source, short)
) STRICT, WITHOUT ROWID;

CREATE TABLE symbols ( -- those that the trace needs
  start INTEGER PRIMARY KEY,
  last INTEGER NOT NULL, -- its last byte
  name TEXT NOT NULL,
  module TEXT -- [module]
) STRICT;

CREATE TABLE cpus ( -- tables that were loaded at the start
  cpu INTEGER PRIMARY KEY,
  tss INTEGER, -- base of the TSS
  idt INTEGER, -- number in gates.idt
  rsp0 INTEGER, ist1 INTEGER, ist2 INTEGER, ist3 INTEGER, ist4 INTEGER, ist5 INTEGER, ist6 INTEGER, ist7 INTEGER,
  fred INTEGER -- 1: events are delivered by FRED; NULL: nothing is known of FRED
) STRICT;

CREATE TABLE gates ( -- known ones, at the start
  idt INTEGER NOT NULL, -- number of the table
  vector INTEGER NOT NULL,
  base INTEGER NOT NULL, -- of the table
  handler INTEGER NOT NULL,
  selector INTEGER NOT NULL,
  ist INTEGER NOT NULL, -- 0: none
  type INTEGER NOT NULL, -- 14 interrupt gate, 15 trap gate
  dpl INTEGER NOT NULL,
  present INTEGER NOT NULL,
  PRIMARY KEY (idt, vector)
) STRICT, WITHOUT ROWID;

CREATE TABLE regions ( -- memory with a meaning, in the order of the layout
  region INTEGER PRIMARY KEY,
  kind TEXT NOT NULL, -- stack; user; stores, reads: all of them into here are in the trace
  cpu INTEGER, -- of a stack
  slot INTEGER, -- of a stack: 1-7 IST, 8 RSP0, 0 other
  name TEXT, -- what the system calls it
  lo INTEGER NOT NULL,
  hi INTEGER NOT NULL,
  assumed INTEGER NOT NULL -- 1: nothing tells lo
) STRICT;

CREATE TABLE events ( -- NULL: the source does not know it
  event INTEGER PRIMARY KEY, -- number in the trace, from 0 on
  kind INTEGER NOT NULL, -- kinds
  cpu INTEGER,
  time INTEGER, -- in ticks of trace.clock_hz
  arg INTEGER, -- the vector of deliver and raise; of other kinds see `tracedbg help sqlite`
  source INTEGER, -- sources: of deliver, raise, vmexit
  rip INTEGER, cs INTEGER, rflags INTEGER, rsp INTEGER, ss INTEGER, -- deliver: the interrupted context
  addr INTEGER, -- return: the popped RIP; write, read: where; move, setsp: from; a failed deliver: words stored
  value INTEGER, -- return: the popped RSP; write: what; move, setsp: to; deliver: CR2 or event data; gap: events lost
  code INTEGER, -- deliver: the error code, or the length of an INT; msr: which
  source_index INTEGER, -- number of the event at its source
  flags INTEGER NOT NULL -- 1 failed, 2 faulted, 4 from a damaged record, 8 external, 16 in SMM, 32 bytes, 64 not in long mode
) STRICT;

CREATE TABLE bytes ( -- of events with flag 32: what does not fit into value
  event INTEGER PRIMARY KEY,
  length INTEGER NOT NULL,
  hex TEXT NOT NULL,
  text TEXT -- of a mark
) STRICT;

CREATE TABLE frames ( -- every exception frame that was ever open: its context was to be resumed, as far as known
  event INTEGER PRIMARY KEY, -- the delivery that stored it
  cpu INTEGER NOT NULL,
  vector INTEGER NOT NULL,
  source INTEGER NOT NULL,
  ist INTEGER NOT NULL, -- 1-7; 0: RSP0, a FRED stack, or the stack in use
  stack_lo INTEGER NOT NULL, stack_hi INTEGER NOT NULL, -- the stack that it lies on
  lo INTEGER NOT NULL, hi INTEGER NOT NULL, -- its bytes [lo, hi)
  rip INTEGER, cs INTEGER, rflags INTEGER, rsp INTEGER, ss INTEGER, error_code INTEGER, -- as stored; NULL: unknown or not pushed
  gate_type INTEGER NOT NULL, -- 14 interrupt gate, 15 trap gate
  fred INTEGER NOT NULL, level INTEGER NOT NULL, from_level INTEGER NOT NULL, -- 1: of FRED, on which stack level, from which
  kernel_gs INTEGER, -- GS base when it was stored: 1 the kernel's, 0 user mode's
  overwrote INTEGER, -- the newest open frame that it overwrote
  ended INTEGER, -- the event after which it was not open any more; NULL: open at the end of the trace
  settle INTEGER, -- settles: why it ended
  overwritten INTEGER, -- the first delivery that stored over it while it was open
  status INTEGER NOT NULL, -- statuses: when it ended; live although overwritten: with the same values
  finding INTEGER -- of that overwrite
) STRICT;

CREATE TABLE findings ( -- as `tracedbg replay` reports them, with their final words
  finding INTEGER PRIMARY KEY,
  rule TEXT NOT NULL, -- `tracedbg explain RULE`
  severity TEXT NOT NULL, -- error, warning, note
  evidence TEXT NOT NULL, -- recorded, computed, inferred, unknown
  cpu INTEGER, -- NULL: all CPUs
  event INTEGER NOT NULL, -- where it was raised
  count INTEGER NOT NULL, -- of findings of this kind that were counted instead of raised, and this one
  raised_as TEXT NOT NULL, -- the rule as known then
  settled INTEGER, -- the event that settled it
  settled_by TEXT, -- settles.name
  cause TEXT, -- why it could happen
  cause_event INTEGER,
  cause_frame INTEGER,
  victim INTEGER, -- events: whose frame it is about, who wrote, who popped it
  writer INTEGER,
  consumer INTEGER,
  lo INTEGER, hi INTEGER, -- bytes [lo, hi) that were overwritten, or of the frame concerned
  slots TEXT NOT NULL, -- words of the frame that were overwritten, and those of them whose value differs
  differ TEXT NOT NULL,
  popped_rip INTEGER, popped_cs INTEGER, popped_rflags INTEGER, popped_rsp INTEGER, popped_ss INTEGER,
  message TEXT NOT NULL,
  signature TEXT NOT NULL -- the same in another recording of the same bug
) STRICT;

CREATE TABLE finding_steps ( -- how it came about
  finding INTEGER NOT NULL,
  step INTEGER NOT NULL,
  event INTEGER NOT NULL,
  text TEXT NOT NULL,
  PRIMARY KEY (finding, step)
) STRICT, WITHOUT ROWID;

CREATE TABLE finding_bytes ( -- the words of the victim's frame
  finding INTEGER NOT NULL,
  addr INTEGER NOT NULL,
  slot TEXT NOT NULL,
  own INTEGER, -- what its delivery stored
  now INTEGER, -- what was left there
  overwritten INTEGER NOT NULL,
  differs INTEGER NOT NULL,
  PRIMARY KEY (finding, addr)
) STRICT, WITHOUT ROWID;
"""

# When all rows are there: sorting once is faster than keeping an index in order.
INDEXES = """\
CREATE INDEX events_delivered ON events (arg) WHERE kind = 1;
CREATE INDEX events_time ON events (time) WHERE time IS NOT NULL;
CREATE INDEX frames_vector ON frames (vector);
CREATE INDEX frames_ended ON frames (ended);
CREATE INDEX frames_hi ON frames (hi);
CREATE INDEX frames_overwritten ON frames (overwritten) WHERE overwritten IS NOT NULL;
CREATE INDEX findings_rule ON findings (rule);
CREATE INDEX findings_event ON findings (event);
CREATE INDEX findings_victim ON findings (victim) WHERE victim IS NOT NULL;
"""


def _symbol(column: str) -> str:
    """SQL for the name of an address: `do_nmi+2`, `scsi_done+0x10 [scsi_mod]`; NULL without a symbol."""
    plus = (
        f"CASE WHEN {column} = s.start THEN '' WHEN {column} - s.start < 10 THEN '+' || ({column} - s.start) "
        f"ELSE printf('+0x%x', {column} - s.start) END"
    )
    return (
        f"(SELECT CASE WHEN {column} <= s.last THEN s.name || {plus} || coalesce(' [' || s.module || ']', '') END\n"
        f"    FROM symbols AS s WHERE s.start <= {column} ORDER BY s.start DESC LIMIT 1)"
    )


def _hex(column: str) -> str:
    """SQL for a number as text that can be pasted into a query; NULL stays NULL."""
    name = column.rpartition(".")[2]
    return f"CASE WHEN {column} IS NOT NULL THEN printf('0x%x', {column}) END AS {name}"


def _stack(frame: str) -> str:
    return (
        f"CASE WHEN {frame}.ist THEN 'IST' || {frame}.ist\n"
        f"    WHEN {frame}.fred AND ({frame}.cs & 3 = 3 OR {frame}.level > {frame}.from_level)\n"
        f"      THEN 'FRED level ' || {frame}.level\n"
        f"    WHEN {frame}.cs & 3 = 3 THEN 'RSP0' ELSE 'current stack' END"
    )


VIEWS = f"""\
CREATE VIEW v_events AS -- events with names; numbers as text
SELECT e.event, e.time * 1.0 / (SELECT clock_hz FROM trace) AS seconds, e.cpu, k.name AS kind,
  CASE WHEN e.kind IN (1, 15) THEN coalesce(n.name, 'delivery of an unknown vector')
    WHEN e.kind = 3 THEN CASE e.arg WHEN 1 THEN 'ERETU' WHEN 2 THEN 'ERETS' ELSE 'IRET' END
    WHEN e.kind = 8 AND e.arg >= 9 THEN 'IST' || (e.arg - 8) WHEN e.kind = 8 THEN 'RSP' || e.arg
    WHEN e.kind = 9 THEN printf('gate 0x%02x', e.arg)
    WHEN e.kind = 19 THEN printf('MSR 0x%x', e.code) WHEN e.kind = 20 THEN 'CR' || e.arg
    WHEN e.kind = 32 THEN b.text END AS name,
  o.name AS source,
  {_symbol("e.rip")} AS symbol,
  {_hex("e.rip")}, {_hex("e.cs")}, {_hex("e.rflags")}, {_hex("e.rsp")}, {_hex("e.ss")},
  e.arg, {_hex("e.addr")}, {_hex("e.value")}, {_hex("e.code")}, b.hex AS bytes, e.source_index,
  e.flags & 1 AS failed, e.flags >> 1 & 1 AS faulted, e.flags >> 2 & 1 AS damaged, e.flags >> 4 & 1 AS smm,
  e.flags >> 6 & 1 AS legacy
FROM events AS e
LEFT JOIN kinds AS k ON k.kind = e.kind
LEFT JOIN sources AS o ON o.source = e.source AND e.kind IN (1, 15, 26)
LEFT JOIN names AS n ON e.kind IN (1, 15) AND n.vector = e.arg AND n.source = coalesce(e.source, 0)
  AND n.short = (coalesce(e.source, 0) = 4 AND coalesce(e.code, 0) = 1)
LEFT JOIN bytes AS b ON b.event = e.event;

CREATE VIEW v_frames AS -- frames with names; numbers as text
SELECT f.event, f.cpu, n.name, o.name AS source, {_stack("f")} AS stack,
  {_symbol("f.rip")} AS symbol,
  {_hex("f.rip")}, {_hex("f.rsp")}, {_hex("f.lo")}, {_hex("f.hi")},
  f.ended, w.words AS why, t.name AS status, f.overwritten, f.overwrote, f.finding, d.rule, d.severity
FROM frames AS f
JOIN events AS e ON e.event = f.event
LEFT JOIN sources AS o ON o.source = f.source
LEFT JOIN names AS n ON n.vector = f.vector AND n.source = f.source
  AND n.short = (f.source = 4 AND coalesce(e.code, 0) = 1)
LEFT JOIN settles AS w ON w.settle = f.settle
LEFT JOIN statuses AS t ON t.status = f.status
LEFT JOIN findings AS d ON d.finding = f.finding;

CREATE VIEW v_findings AS -- findings with the names of who had a part in them
SELECT d.finding, d.severity, d.rule, d.evidence, d.cpu, d.event, d.count,
  v.name AS victim_name, d.victim, v.stack, w.name AS writer_name, d.writer, d.consumer,
  {_hex("d.lo")}, {_hex("d.hi")}, d.slots, d.differ, d.cause, d.message
FROM findings AS d
LEFT JOIN v_frames AS v ON v.event = d.victim
LEFT JOIN v_events AS w ON w.event = d.writer;
"""
