"""Marks of events, kept in a file beside the trace: `TRACE.marks.json`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from tracedbg.errors import FormatError, TracedbgError, UsageError
from tracedbg.output import create_beside, os_error, output_place
from tracedbg.text import clean, clean_path
from tracedbg.trace import Trace
from tracedbg.wire import EVENT_SIZE

SCHEMA = "tracedbg marks"
VERSION = 1
MAX_FILE = 4 << 20  # bytes
MAX_MARKS = 10_000
MAX_NOTE = 200  # characters
EDGE = 4096  # events at the beginning that the digest covers; at the end 64, and 64 between
SAMPLES = 64


class Marks:
    """Events and their notes. What cannot be kept in the file lives as long as this object; `problem` says why."""

    def __init__(self, trace: Trace) -> None:
        self.notes: dict[int, str] = {}
        self.problem = ""
        self.is_wrong = False  # there is a file, or a place for one, and it cannot be used
        self._trace = trace
        self._path: str | None = None
        if not os.path.isfile(trace.path):
            self.problem = "marks live until the viewer ends: the trace is not a file"
            return
        self._path = f"{trace.path}.marks.json"
        try:
            self.notes = _read(self._path, trace)
        except FileNotFoundError:
            pass
        except (OSError, TracedbgError) as error:
            self._give_up(error if isinstance(error, TracedbgError) else os_error(self._path, error), "not used")

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return iter(sorted(self.notes.items()))

    def set(self, event: int, note: str) -> None:
        """Mark an event. Raises UsageError if there are too many."""
        if event not in self.notes and len(self.notes) >= MAX_MARKS:
            raise UsageError(f"there are {MAX_MARKS:,} marks, which is the limit")
        self.notes[event] = clean(note.strip(), MAX_NOTE)
        self._save()

    def clear(self, event: int) -> None:
        """Take a mark away."""
        if self.notes.pop(event, None) is not None:
            self._save()

    def _save(self) -> None:
        if self._path is None:
            return
        try:
            _write(self._path, self._trace, self.notes)
        except TracedbgError as error:
            self._give_up(error, "not written")

    def _give_up(self, error: TracedbgError, what: str) -> None:
        """From now on the file is left as it is."""
        self._path = None
        self.is_wrong = True
        self.problem = f"marks live until the viewer ends, the file is {what}: {clean(str(error), 300)}"


def digest(trace: Trace, count: int) -> str:
    """Tells traces apart by their first `count` events, not all of which are read. A trace that grows keeps it."""
    hash_ = hashlib.sha256(b"%d %d\n" % (count, trace.cpus))
    step = max(count // SAMPLES, 1)
    spans = [(0, min(count, EDGE)), *((at, at + 1) for at in range(0, count, step)), (max(count - SAMPLES, 0), count)]
    for lo, hi in spans:
        with trace.events[lo * EVENT_SIZE : hi * EVENT_SIZE] as part:
            hash_.update(part)
    return hash_.hexdigest()


def _read(path: str, trace: Trace) -> dict[int, str]:
    """The marks in a file. Raises FormatError if it is none of this trace, OSError if it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise FormatError(path, f"larger than {MAX_FILE >> 20} MiB")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError(path, "is not JSON") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise FormatError(path, "is not a file of marks")
    if content.get("version") != VERSION:
        raise FormatError(path, f"is of another version than {VERSION}")
    count: Any = content.get("events")
    if not _is_event(count, trace.count + 1) or content.get("digest") != digest(trace, int(count)):
        raise FormatError(path, "belongs to another trace")
    marks = content.get("marks")
    if not isinstance(marks, list) or len(marks) > MAX_MARKS:
        raise FormatError(path, "is damaged: no list of marks")
    result: dict[int, str] = {}
    for number, mark in enumerate(marks):
        if not isinstance(mark, dict) or not _is_event(mark.get("event"), trace.count) or not isinstance(mark.get("note"), str):
            raise FormatError(path, f"is damaged: mark {number} is none")
        result[mark["event"]] = clean(mark["note"], MAX_NOTE)
    return result


def _is_event(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _write(path: str, trace: Trace, notes: dict[int, str]) -> None:
    """Replace the file, which is whole at all times; without marks it goes. Raises FormatError."""
    marks = [{"event": event, "note": note} for event, note in sorted(notes.items()) if event < trace.count]
    content = {"schema": SCHEMA, "version": VERSION, "events": trace.count, "digest": digest(trace, trace.count), "marks": marks}
    temporary = None
    try:
        if not notes:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        place = output_place(path, force=True)
        if place is None:
            raise FormatError(clean_path(path), "is not a regular file")
        file, temporary = create_beside(place)
        with file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        os.replace(temporary, place)
        temporary = None
    except OSError as error:
        raise os_error(path, error) from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
