"""What the recorded systems said of themselves: the guest's print, debugger records, RAM dumps; and what the replay predicts."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dumpjson import load

from tracedbg import rules, x86
from tracedbg.layout import Layout
from tracedbg.replay import Replay
from tracedbg.state import Context, Event, Finding, Frame, Kind, Word
from tracedbg.trace import Trace

U32 = (1 << 32) - 1
RAM_BASE = 0x106000  # of the dumps mem_NN_TAG.bin; linear = physical

Words = tuple[int, int, int, int, int]  # rip, cs, rflags, rsp, ss: upwards from the address that an IRET takes


def comparable(rip: int, cs: int, rflags: int, rsp: int, ss: int) -> Words:
    """A frame's words as far as QEMU and software leave them alone: 32 bits of RFLAGS without RF."""
    return (rip, cs, rflags & U32 & ~x86.RFLAGS_RF, rsp, ss)


def predicted(saved: Context) -> Words:
    """The words of a frame of the replay; every one has to be known."""
    assert saved.rip is not None and saved.cs is not None and saved.rflags is not None
    assert saved.rsp is not None and saved.ss is not None
    return comparable(saved.rip, saved.cs, saved.rflags, saved.rsp, saved.ss)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A delivery of a trace with the frame that the replay places for it; None: none can be placed."""

    event: Event
    frame: Frame | None

    @property
    def placed(self) -> Frame:
        assert self.frame is not None, f"no frame for {self.event.source_index}"
        return self.frame


def deliveries(trace: Trace, layout: Layout | None = None) -> list[Delivery]:
    """All deliveries that did not fail. A frame's words are checked against the memory of the replay on the way."""
    result = []
    with Replay(trace, layout=layout) as replay:
        for event in events(trace, Kind.DELIVER):
            replay.seek(event.index + 1)
            frame = replay.last_frame()
            if event.flags & 1:
                assert frame is None, "a failed delivery has no frame"
                continue
            if frame is not None:
                assert frame.entry == event.index
                words = {w.addr: w for w in replay.words(frame.lo, frame.hi)}
                assert all(w.known == 0xFF and w.writers == (event.index,) * 8 for w in words.values())
                assert comparable(*(words[frame.rip_addr + 8 * n].value for n in range(5))) == predicted(frame.saved)
            result.append(Delivery(event, frame))
    return result


def placed_frames(trace: Trace) -> dict[int, Frame]:
    """The frames of a large trace, by the index of their delivery; their memory is not looked at."""
    frames = {}
    with Replay(trace) as replay:
        for event in events(trace, Kind.DELIVER):
            replay.seek(event.index + 1)
            frame = replay.last_frame()
            if frame is not None:
                frames[event.index] = frame
    return frames


def events(trace: Trace, kind: Kind) -> Iterator[Event]:
    """The events of one kind."""
    for index in range(trace.count):
        event = trace.event(index)
        if event.kind is kind:
            yield event


# -- the guest's own print ---------------------------------------------------------------------------------------------

_PRINT = re.compile(
    r"^\w+ cpu=(\w+) vec=(\w+) frame@(\w+): rip=(\w+) cs=(\w+) rflags=(\w+) rsp=(\w+) ss=(\w+) err=(\w+) depth=(\w+)$", re.M
)
_OUTER = re.compile(r"^OUTER-FRAME-(WAS|NOW) \w+ rip=(\w+) cs=(\w+) rflags=(\w+) rsp=(\w+) ss=(\w+)$", re.M)
_SNAP = re.compile(r"^SNAP (\w+) \[top-(\w+)\]=(\w+)$")
_TOP = re.compile(r"(\w+)_top=(\w+)")


@dataclass(frozen=True, slots=True)
class Print:
    """One frame as the guest's handler printed it. `address` is that of the RIP slot, with or without an error code."""

    cpu: int
    vector: int
    address: int
    words: Words
    code: int


def prints(serial: str) -> list[Print]:
    """Every frame that a handler of the guest printed, in order."""
    result = []
    for match in _PRINT.finditer(serial):
        cpu, vector, address, rip, cs, rflags, rsp, ss, code, _ = (int(g, 16) for g in match.groups())
        result.append(Print(cpu, vector, address, comparable(rip, cs, rflags, rsp, ss), code))
    return result


def outer_frames(serial: str) -> tuple[Words, Words] | None:
    """The outer handler's frame as it was and as it found it before its return, if it looked."""
    found = {m[1]: comparable(*(int(g, 16) for g in m.groups()[1:])) for m in _OUTER.finditer(serial)}
    return (found["WAS"], found["NOW"]) if found else None


def stack_tops(serial: str) -> dict[str, int]:
    """Tops of the IST stacks of CPU 0 ("nmi") and CPU 1 ("nmi1")."""
    tops: dict[str, int] = {}
    for line in serial.splitlines():
        if line.startswith("LAYOUT cpu"):
            suffix = "" if line.startswith("LAYOUT cpu0") else "1"
            tops |= {m[1] + suffix: int(m[2], 16) for m in _TOP.finditer(line)}
    return tops


def snapshots(serial: str) -> list[tuple[str, dict[int, int]]]:
    """The guest's print of the eight topmost words of CPU 0's IST stacks, at each moment: address -> word."""
    tops = stack_tops(serial)
    result: list[tuple[str, dict[int, int]]] = []
    for line in serial.splitlines():
        if line.startswith("SNAP-BEGIN "):
            result.append((line.split()[1], {}))
        elif match := _SNAP.match(line):
            result[-1][1][tops[match[1]] - int(match[2], 16)] = int(match[3], 16)
    return result


# -- memory --------------------------------------------------------------------------------------------------------------


def ram(path: Path) -> dict[int, int]:
    """A dump mem_NN_TAG.bin(.gz) as address -> word."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    return dict(zip(range(RAM_BASE, RAM_BASE + len(raw), 8), words_of(raw), strict=True))


def words_of(raw: bytes) -> list[int]:
    """Little-endian 64-bit words."""
    return [int.from_bytes(raw[n : n + 8], "little") for n in range(0, len(raw), 8)]


def monitor_words(text: str) -> dict[int, int]:
    """Lines of `x /NNxg` as address -> word."""
    memory = {}
    for line in text.splitlines():
        address, words = line.split(":")
        for n, word in enumerate(words.split()):
            memory[int(address, 16) + 8 * n] = int(word, 16)
    return memory


def dump_stacks(path: Path) -> dict[int, dict[int, int]]:
    """The IST stacks of CPU 0 in a `*.dump.json`: top -> (address -> word). One that could not be read is left out."""
    stacks = {}
    for stack in load(path)["vcpus"][0]["stacks"].values():
        if "hex" in stack:
            top, raw = int(stack["top"], 16), bytes.fromhex(stack["hex"])
            stacks[top] = dict(zip(range(top - len(raw), top, 8), words_of(raw), strict=True))
    return stacks


def frame_at(memory: dict[int, int], address: int) -> Words:
    """The five words that an IRET would pop at `address`."""
    return comparable(*(memory[address + 8 * n] for n in range(5)))


def known_part(word: Word) -> int:
    """Mask of the known bytes of a word of the replay."""
    return sum(0xFF << 8 * n for n in range(8) if word.known >> n & 1)


# -- debugger records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """A handler's entry or exit as the debugger saw it. words: None where the frame could not be read."""

    kind: str
    what: str
    rsp: int
    words: Words | None


def steps(path: Path, kind: str) -> list[Step]:
    """The entries ("enter") or exits ("exit") in a `*.truth.json`."""
    result = []
    for item in load(path)["truth"]:
        if item["kind"] == kind:
            frame = item["frame"]
            words = None if frame == "E14" else comparable(*(int(v, 16) for v in frame[:5]))
            result.append(Step(kind, item["what"], int(item["rsp"], 16), words))
    return result


# -- verdicts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """A finding in the source's own numbers."""

    rule: str
    severity: str
    raised: str  # the rule as raised
    evidence: str  # as raised
    victim: int | None
    writer: int | None
    lo: int
    hi: int


def verdict(finding: Finding, trace: Trace) -> Verdict:
    """The words of a finding that the data's description fixes."""

    def number(frame: Frame | None) -> int | None:
        return None if frame is None else trace.event(frame.entry).source_index

    return Verdict(
        rules.rule_id(finding.rule), rules.finding_severity(finding), rules.rule_id(finding.raised_rule),
        finding.evidence.name.lower(), number(finding.victim), number(finding.writer), finding.lo, finding.hi,
    )  # fmt: skip


def slot_names(mask: int) -> list[str]:
    """The slots of a finding's mask."""
    return [name for n, name in enumerate(x86.SLOT_NAMES) if mask >> n & 1]


def differing(one: Words, other: Words) -> list[str]:
    """The slots in which two frames differ."""
    return [name for name, a, b in zip(x86.SLOT_NAMES, one, other, strict=False) if a != b]


def findings(trace: Trace, layout: Layout | None = None) -> tuple[Finding, ...]:
    """All findings of a trace."""
    with Replay(trace, layout=layout) as replay:
        replay.scan_all()
        return replay.findings()


def newest_on(placed: Iterable[Delivery], top: int) -> Frame | None:
    """The newest frame that begins at the top of a stack."""
    return next((d.placed for d in reversed(list(placed)) if d.frame is not None and d.frame.hi == top & ~15), None)
