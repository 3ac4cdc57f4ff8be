"""A small reader of CTF 1.8 directories as tracedbg writes them: byte-aligned little-endian fields. It knows the metadata only
by its text, and says an event as `babeltrace2 --clock-cycles --no-delta` does."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = 0xC1FC1FC1
ESCAPES = {"\\": "\\\\", '"': '\\"', "'": "\\'", "?": "\\?"}


@dataclass(frozen=True)
class Type:
    """An integer, or an enumeration of one."""

    code: str
    base: int
    labels: tuple[tuple[int, int, str], ...] | None = None

    def say(self, value: int) -> str:
        if self.labels is None:
            return f"0x{value:X}" if self.base == 16 else f"{value}"
        found = next((f'"{label}"' for lo, hi, label in self.labels if lo <= value <= hi), "<unknown>")
        return f"( {found} : container = {value} )"


@dataclass(frozen=True)
class Event:
    """One event as read."""

    cpu: int | None
    time: int
    name: str
    index: int
    fields: dict[str, Any]
    text: str


def _blocks(text: str, word: str) -> Iterator[str]:
    """The bodies of `word { ... };` at the left margin."""
    for match in re.finditer(rf"^{word} {{\n(.*?)^}};", text, re.S | re.M):
        yield match[1]


def _value(body: str, name: str) -> str:
    found = re.search(rf'^\t{name} = (?:"((?:[^"\\]|\\.)*)"|([^;]*));', body, re.M)
    assert found, (name, body)
    return re.sub(r"\\(.)", r"\1", found[1]) if found[1] is not None else found[2]


def _members(body: str, name: str) -> list[tuple[str, str]]:
    found = re.search(rf"^\t{re.escape(name)} := struct {{ (.*)}};", body, re.M)
    assert found, (name, body)
    return [(kind, member) for kind, member in re.findall(r"(\w+) ([\w\[\]]+);", found[1])]


class Directory:
    """A CTF trace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = (path / "metadata").read_text(encoding="ascii")
        assert text.startswith("/* CTF 1.8 */\n")
        self.text = text
        self.types: dict[str, Type] = {}
        for size, base, name in re.findall(
            r"^typealias integer { size = (\d+); align = 8; signed = false; base = (\d+);.* } := (\w+);", text, re.M
        ):
            self.types[name] = Type({"8": "B", "16": "H", "32": "I", "64": "Q"}[size], int(base))
        for size, body, name in re.findall(r"^typealias enum : (\w+) {\n(.*?)^} := (\w+);", text, re.S | re.M):
            labels = [
                (int(lo), int(hi or lo), label)
                for label, lo, hi in re.findall(r'^\t"((?:[^"\\]|\\.)*)" = (\d+)(?: \.\.\. (\d+))?,$', body, re.M)
            ]
            self.types[name] = Type(self.types[size].code, 10, tuple(labels))
        (trace,) = _blocks(text, "trace")
        self.uuid = bytes.fromhex(_value(trace, "uuid").replace("-", ""))
        (clock,) = _blocks(text, "clock")
        self.clock = {name: _value(clock, name) for name in ("name", "description", "freq")}
        (env,) = _blocks(text, "env")
        self.env = {name: _value(env, name) for name in re.findall(r"^\t(\w+) = ", env, re.M)}
        self.streams = {int(_value(body, "id")): body for body in _blocks(text, "stream")}
        self.classes = {
            (int(_value(body, "stream_id")), int(_value(body, "id"))): (_value(body, "name"), _members(body, "fields"))
            for body in _blocks(text, "event")
        }
        self.discarded: dict[str, list[tuple[int, int, int]]] = {}

    def _take(self, data: bytes, at: int, members: list[tuple[str, str]]) -> tuple[dict[str, Any], int]:
        """A structure; an array is as long as the member says that its brackets name, or the number in them."""
        values: dict[str, Any] = {}
        for kind, member in members:
            if kind == "string":
                end = data.index(0, at)
                values[member], at = data[at:end].decode(), end + 1
                continue
            code = self.types[kind].code
            if "[" in member:
                name, length = member.rstrip("]").split("[")
                number = int(length) if length.isdigit() else values[length]
                values[name] = list(struct.unpack_from(f"<{number}{code}", data, at))
                at += number * struct.calcsize(code)
                continue
            (values[member],) = struct.unpack_from(f"<{code}", data, at)
            at += struct.calcsize(code)
        return values, at

    def _say(self, values: dict[str, Any], members: list[tuple[str, str]]) -> str:
        parts = []
        for kind, member in members:
            name = member.partition("[")[0]
            value = values[name]
            if kind == "string":
                shown = '"' + "".join(ESCAPES.get(ch, ch) for ch in value) + '"'
            elif "[" in member:
                items = [f"[{n}] = {self.types[kind].say(item)}" for n, item in enumerate(value)]
                shown = f"[ {', '.join(items)} ]"
            else:
                shown = self.types[kind].say(value)
            parts.append(f"{name} = {shown}")
        return f"{{ {', '.join(parts)} }}" if parts else "{ }"

    def events(self) -> Iterator[Event]:
        """The events, stream by stream; checks what the format asks of packets."""
        (trace,) = _blocks(self.text, "trace")
        header = _members(trace, "packet.header")
        for path in sorted(self.path.iterdir()):
            if path.name == "metadata":
                continue
            data = path.read_bytes()
            assert data
            at, last, discarded = 0, 0, 0
            losses = self.discarded.setdefault(path.name, [])
            while at < len(data):
                begin = at
                head, at = self._take(data, at, header)
                assert head["magic"] == MAGIC
                assert bytes(head["uuid"]) == self.uuid
                body = self.streams[head["stream_id"]]
                context, at = self._take(data, at, _members(body, "packet.context"))
                assert context["content_size"] == context["packet_size"]
                assert context["timestamp_begin"] >= last
                if context["events_discarded"] != discarded:
                    losses.append((last, context["timestamp_end"], context["events_discarded"] - discarded))
                    discarded = context["events_discarded"]
                    assert discarded >= 0
                end, first = begin + context["content_size"] // 8, True
                while at < end:
                    found, at = self._event(data, at, head["stream_id"], context.get("cpu_id"))
                    assert found.time >= last
                    assert not first or found.time == context["timestamp_begin"]
                    last, first = found.time, False
                    yield found
                assert at == end
                assert last == context["timestamp_end"]

    def _event(self, data: bytes, at: int, stream: int, cpu: int | None) -> tuple[Event, int]:
        head, at = self._take(data, at, _members(self.streams[stream], "event.header"))
        context, at = self._take(data, at, _members(self.streams[stream], "event.context"))
        name, members = self.classes[stream, head["id"]]
        fields, at = self._take(data, at, members)
        packet = "" if cpu is None else f"{{ cpu_id = {cpu} }}, "
        text = f"[{head['timestamp']:020}] {name}: {packet}{{ index = {context['index']} }}, {self._say(fields, members)}"
        return Event(cpu, head["timestamp"], name, context["index"], fields, text), at
