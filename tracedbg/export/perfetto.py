"""Perfetto's protobuf: track events, as ui.perfetto.dev and trace_processor read them (`pip install 'tracedbg[perfetto]'`).

Packets are framed by the package's builder as they come; strings are interned (protos/perfetto/trace/interned_data), in a
table that is begun again before it grows large. Slices are two packets, begin and end; all that is known stands at the begin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TracePacket, TrackDescriptor, TrackEvent

from tracedbg.export import tracks
from tracedbg.export.clock import Clock
from tracedbg.export.tracks import Group, Item, Track
from tracedbg.trace import Trace

if TYPE_CHECKING:
    from tracedbg.formats import WriterOptions

SEQUENCE = 1  # all packets are of one writer
MAX_INTERNED = 1 << 16
ROOMS = ("event_names", "event_categories", "debug_annotation_names", "debug_annotation_string_values")
NAMES, CATEGORIES, ARGS, STRINGS = range(4)
INSTANT, BEGIN, END = TrackEvent.Type.TYPE_INSTANT, TrackEvent.Type.TYPE_SLICE_BEGIN, TrackEvent.Type.TYPE_SLICE_END
NEEDS_STATE = TracePacket.SequenceFlags.SEQ_NEEDS_INCREMENTAL_STATE
CLEARS_STATE = NEEDS_STATE | TracePacket.SequenceFlags.SEQ_INCREMENTAL_STATE_CLEARED


def write(trace: Trace, path: str, options: WriterOptions) -> None:
    """As registry.Writer."""
    clock = Clock(trace)
    with open(path, "wb") as out:
        writer = _Writer(out)
        for told in tracks.story(trace, options, clock):
            writer.tell(told)


class _Writer:
    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._interned: tuple[dict[str, int], ...] = ({}, {}, {}, {})
        self._cleared = False

    def tell(self, told: tracks.Told) -> None:
        """Write it."""
        if isinstance(told, Item):
            self._item(told)
            return
        packet = TracePacket(trusted_packet_sequence_id=SEQUENCE)
        track = packet.track_descriptor
        track.uuid, track.name = told.number, told.name
        if isinstance(told, Group):
            track.description = told.text
            track.child_ordering = TrackDescriptor.ChildTracksOrdering.EXPLICIT
        elif isinstance(told, Track):
            track.parent_uuid, track.sibling_order_rank = told.group, told.rank
        self._write(packet)

    def _item(self, item: Item) -> None:
        if sum(map(len, self._interned)) > MAX_INTERNED:
            self._interned = ({}, {}, {}, {})
            self._cleared = False
        flags = NEEDS_STATE if self._cleared else CLEARS_STATE
        self._cleared = True
        packet = TracePacket(trusted_packet_sequence_id=SEQUENCE, timestamp=item.begin, sequence_flags=flags)
        event = packet.track_event
        event.type = INSTANT if item.end is None else BEGIN
        event.track_uuid = item.track
        event.name_iid = self._intern(packet, NAMES, item.name)
        event.category_iids.append(self._intern(packet, CATEGORIES, item.category))
        for flow in item.flows:
            (event.terminating_flow_ids if flow.step == 2 else event.flow_ids).append(flow.number)
        add = event.debug_annotations.add
        for name, value, is_address in item.args:
            note = add()
            note.name_iid = self._intern(packet, ARGS, name)
            if isinstance(value, str):
                note.string_value_iid = self._intern(packet, STRINGS, value)
            elif is_address:
                note.pointer_value = value
            else:
                note.uint_value = value
        self._write(packet)
        if item.end is not None:
            packet = TracePacket(trusted_packet_sequence_id=SEQUENCE, timestamp=item.end, sequence_flags=NEEDS_STATE)
            packet.track_event.type, packet.track_event.track_uuid = END, item.track
            self._write(packet)

    def _intern(self, packet: TracePacket, room: int, text: str) -> int:
        """The number of a text; a new one goes with the packet."""
        table = self._interned[room]
        number = table.get(text)
        if number is None:
            number = table[text] = len(table) + 1
            entry = getattr(packet.interned_data, ROOMS[room]).add()
            entry.iid = number
            if room == STRINGS:
                entry.str = text.encode()
            else:
                entry.name = text
        return number

    def _write(self, packet: TracePacket) -> None:
        """A packet as field 1 of the message Trace: its key, its length as a varint, its bytes."""
        data = packet.SerializeToString(deterministic=True)
        length, head = len(data), bytearray(b"\x0a")
        while length > 0x7F:
            head.append(length & 0x7F | 0x80)
            length >>= 7
        head.append(length)
        self._out.write(bytes(head) + data)
