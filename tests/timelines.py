"""Reads what is written for viewers of timelines into common rows, by the rules that the viewers follow."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """A slice or an instant (end None) as a viewer shows it; times in ns; depth: slices around it on its track."""

    group: str
    track: str
    begin: int
    end: int | None
    name: str
    category: str
    args: dict[str, Any]
    depth: int = 0
    flows: list[tuple[int, str]] = field(default_factory=list)  # number, s t f

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.group, self.track, self.begin, self.end or -1, self.name, self.args.get("event", -1))


def _no_constant(text: str) -> None:
    raise AssertionError(text)


def read_chrome(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The head and the rows of a JSON file. Slices that do not nest are an error."""
    raw = path.read_bytes()
    assert raw.isascii()
    document = json.loads(raw, parse_float=Fraction, parse_constant=_no_constant)
    groups: dict[int, str] = {}
    tracks: dict[int, str] = {}
    rows: list[Row] = []
    by_track: dict[int, list[Row]] = {}
    stations: list[tuple[int, int, int, str, str]] = []
    for event in document["traceEvents"]:
        pid, tid, phase = event["pid"], event["tid"], event["ph"]
        if phase == "M":
            if event["name"] == "process_name":
                assert groups.setdefault(pid, event["args"]["name"]) == event["args"]["name"]
            if event["name"] == "thread_name":
                assert tid not in tracks
                tracks[tid] = event["args"]["name"]
            continue
        begin = event["ts"] * 1000
        assert begin == int(begin) >= 0
        if phase in "stf":
            assert phase != "f" or event["bp"] == "e"
            stations.append((tid, int(begin), event["id"], phase, event["name"] + event["cat"]))
            continue
        assert phase in "Xi"
        assert phase != "i" or event["s"] == "t"
        end = int(begin + event["dur"] * 1000) if phase == "X" else None
        assert end is None or end >= begin
        row = Row(groups[pid], tracks[tid], int(begin), end, event["name"], event["cat"], event["args"])
        rows.append(row)
        by_track.setdefault(tid, []).append(row)
    for on in by_track.values():
        _nest(on)
    for tid, begin, number, phase, _ in stations:
        around = [row for row in by_track[tid] if row.end is not None and row.begin <= begin < row.end]
        assert around, "a flow outside of any slice"
        max(around, key=lambda row: row.depth).flows.append((number, phase))
    return document["otherData"], rows


def _nest(rows: list[Row]) -> None:
    """Depths of the slices of a track, by their times; equal begins in the order of the file."""
    open_: list[Row] = []
    for row in sorted((row for row in rows if row.end is not None), key=lambda row: row.begin):
        assert row.end is not None
        while open_ and (open_[-1].end or 0) <= row.begin:
            open_.pop()
        if open_:
            assert row.end <= (open_[-1].end or 0), f"{row} does not nest in {open_[-1]}"
        row.depth = len(open_)
        open_.append(row)


def read_perfetto(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The rows of a Perfetto trace: packets by time, in the order of the file where times are equal."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TracePacket, TrackEvent

    trace = Trace()
    trace.ParseFromString(path.read_bytes())
    tracks: dict[int, Any] = {}
    tables: dict[str, dict[int, str]] = {}
    events: list[tuple[int, Any, str, str, dict[str, Any]]] = []
    begun = False
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        if packet.HasField("track_descriptor"):
            assert packet.track_descriptor.uuid not in tracks
            tracks[packet.track_descriptor.uuid] = packet.track_descriptor
            continue
        assert packet.sequence_flags & TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        if packet.sequence_flags & TracePacket.SEQ_INCREMENTAL_STATE_CLEARED:
            tables, begun = {}, True
        assert begun
        for place in ("event_names", "event_categories", "debug_annotation_names", "debug_annotation_string_values"):
            table = tables.setdefault(place, {})
            for entry in getattr(packet.interned_data, place):
                assert entry.iid not in table
                table[entry.iid] = entry.str.decode() if place.endswith("values") else entry.name
        event = packet.track_event
        assert event.track_uuid in tracks
        if event.type == TrackEvent.TYPE_SLICE_END:
            events.append((packet.timestamp, event, "", "", {}))
            continue
        args: dict[str, Any] = {}
        for note in event.debug_annotations:
            name = tables["debug_annotation_names"][note.name_iid]
            assert name not in args
            kind = note.WhichOneof("value")
            value = getattr(note, kind)
            if kind == "string_value_iid":
                value = tables["debug_annotation_string_values"][value]
            args[name] = f"{value:#x}" if kind == "pointer_value" else value
        category = tables["event_categories"][event.category_iids[0]]
        events.append((packet.timestamp, event, tables["event_names"][event.name_iid], category, args))
    rows: list[Row] = []
    open_: dict[int, list[Row]] = {}
    steps: dict[int, bool] = {}
    for time, event, name, category, args in sorted(events, key=lambda item: item[0]):
        on = open_.setdefault(event.track_uuid, [])
        if event.type == TrackEvent.TYPE_SLICE_END:
            on.pop().end = time
            continue
        track = tracks[event.track_uuid]
        row = Row(tracks[track.parent_uuid].name, track.name, time, None, name, category, args, len(on))
        rows.append(row)
        for number in event.flow_ids:
            assert steps.get(number, True)
            row.flows.append((number, "t" if number in steps else "s"))
            steps[number] = True
        for number in event.terminating_flow_ids:
            assert steps[number]
            row.flows.append((number, "f"))
            steps[number] = False
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            on.append(row)
    assert not any(open_.values())
    assert not any(steps.values()), "a flow without an end"
    for row in rows:
        if row.end is None:
            row.depth = 0
    roots = [track for track in tracks.values() if not track.parent_uuid]
    return {"time": {root.description for root in roots}}, rows
