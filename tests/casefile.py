"""The [expect] part of case files (`tracedbg help case` has the grammar), parsed. What is wrong in it is a LineError."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tracedbg import rules, x86
from tracedbg.formats import open_input
from tracedbg.formats.case import text as case_text
from tracedbg.formats.case.text import LineError, shown, split_comment
from tracedbg.state import (
    Cause,
    CpuState,
    Evidence,
    FrameStatus,
    Mismatch,
    Rule,
    Settle,
    Shadow,
    ShutdownReason,
)
from tracedbg.trace import Trace

U64 = 1 << 64
VERDICTS = ("clean", *rules.SEVERITIES)
OPTIONS = ("iret-fault-unblocks", "nmi-fail-blocks", "max-frames")
EVENT_FIELDS = frozenset({"event", "nmi_since", "nmi_unblocked_by", "nmi_unblock_frame", "ring_gap"})
BOOL_FIELDS = frozenset(name for name, kind in CpuState.__annotations__.items() if "bool" in kind)
STATE_FIELDS = frozenset(CpuState.__annotations__) - {"cpu"}
SAVED = ("rip", "cs", "rflags", "rsp", "ss", "code")


def word_of(member: Any) -> str:
    """An enum member as these files write it."""
    return str(member.name.lower().replace("_", "-"))


def words_of(enum: Any) -> dict[str, Any]:
    return {word_of(member): member for member in enum}


@dataclass(frozen=True)
class Expectation:
    """One line: what kind, where in the file, the position it speaks of, and what it wants."""

    kind: str
    line: int
    position: int
    subject: Any
    want: dict[str, Any]


@dataclass
class Case:
    """A case file that was read."""

    path: Path
    trace: Trace
    text: case_text.CaseText
    expect: list[Expectation] = field(default_factory=list)
    options: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Case:
        return self

    def __exit__(self, *_: object) -> None:
        self.trace.close()


def load(path: Path) -> Case:
    """Read a file. Raises FormatError for what the reader refuses, LineError for a wrong [expect]."""
    trace = open_input(str(path))
    try:
        text = case_text.from_meta(trace.meta.get(case_text.META_KEY), trace.count) or case_text.CaseText()
        case = Case(path, trace, text)
        _, found = case_text.sections(case_text.decode(path.read_bytes()))
        if case_text.EXPECT in found:
            Parser(case).parse(found[case_text.EXPECT].numbered())
    except BaseException:
        trace.close()
        raise
    return case


# -- parsing ------------------------------------------------------------------------------------------------------------


class Parser:
    """Reads the lines of [expect] into a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.line = 0
        self.words: list[str] = []

    def parse(self, lines: Any) -> None:
        for self.line, text in lines:
            body, _ = split_comment(text)
            self.words = re.findall(r"[^\s:,=]+|[:=,]", body)
            if not self.words:
                continue
            kind = self.take()
            parse: Callable[[], Iterator[Expectation]] | None = getattr(self, f"_{kind}", None) if kind in KINDS else None
            if parse is None:
                self.fail(f"{shown(kind)} is no expectation (known: {', '.join(KINDS)})")
            found = list(parse())
            if self.words:
                self.fail(f"what is {shown(' '.join(self.words))}?")
            self.case.expect += found

    def fail(self, message: str) -> NoReturn:
        raise LineError(self.line, message)

    def take(self, what: str = "a word") -> str:
        if not self.words:
            self.fail(f"{what} is missing")
        return self.words.pop(0)

    def want(self, *accepted: str) -> str:
        word = self.take(" or ".join(accepted))
        if word not in accepted:
            self.fail(f"{shown(word)} instead of {' or '.join(accepted)}")
        return word

    def got(self, word: str) -> bool:
        """Take that word if it is the next one."""
        if self.words[:1] == [word]:
            self.words.pop(0)
            return True
        return False

    def number(self, what: str, bits: int = 64) -> int:
        return case_text.number(self.take(what), bits, self.line, what)

    def event(self) -> int:
        """A number or a label of an event of this trace."""
        word = self.take("an event")
        if word in self.case.text.labels:
            return self.case.text.labels[word]
        if not word[0].isdigit():
            self.fail(f"no event is labelled {shown(word)}")
        value = case_text.number(word, 32, self.line, "event")
        if value >= self.case.trace.count:
            self.fail(f"there is no event {value}, the last is {self.case.trace.count - 1}")
        return value

    def event_or_none(self) -> int | None:
        return None if self.got("none") else self.event()

    def position(self) -> int:
        """`after EVENT`, `before EVENT`, `at start`; nothing: the end."""
        if self.got("after"):
            return self.event() + 1
        if self.got("before"):
            return self.event()
        if self.got("at"):
            return 0 if self.want("start", "end") == "start" else self.case.trace.count
        return self.case.trace.count

    def range(self) -> tuple[int, int]:
        word = self.take("LO-HI")
        low, dash, high = word.partition("-")
        if not dash:
            self.fail(f"{shown(word)} is not LO-HI")
        lo, hi = (case_text.number(part, 64, self.line, "LO-HI") for part in (low, high))
        if lo >= hi:
            self.fail(f"{shown(word)} is empty")
        return lo, hi

    def choice(self, names: dict[str, Any], what: str) -> Any:
        word = self.take(what)
        if word not in names:
            self.fail(f"{what}: no {shown(word)} (known: {', '.join(names)})")
        return names[word]

    def some(self, names: dict[str, Any], what: str) -> list[Any]:
        """`a, b` or `none`."""
        if self.got("none"):
            return []
        result = [self.choice(names, what)]
        while self.got(","):
            result.append(self.choice(names, what))
        return result

    # one method for each kind of line

    def _option(self) -> Iterator[Expectation]:
        name = self.choice({n: n for n in OPTIONS}, "option")
        if name in self.case.options:
            self.fail(f"option {name} is there twice")
        self.case.options[name] = (
            self.number(name, 32) if name == "max-frames" else int(self.want("yes", "no") == "yes")
        )
        yield from ()

    def _frame(self) -> Iterator[Expectation]:
        event = self.event()
        self.want(":")
        want: dict[str, Any] = {}
        if self.got("none"):
            want["none"] = True
        else:
            want["lo"], want["hi"] = self.range()
        while self.words and "none" not in want:
            word = self.take()
            if word in want:
                self.fail(f"{word} is there twice")
            if re.fullmatch("ist[1-7]", word) or word == "no-ist":
                want["ist"] = 0 if word == "no-ist" else int(word[3])
            elif word in SAVED:
                want[word] = None if self.got("?") else self.number(word)
            elif word in ("level", "from-level", "vector", "cpu"):
                want[word.replace("-", "_")] = self.number(word, 16)
            else:
                self.fail(f"a frame has no {shown(word)}")
        yield Expectation("frame", self.line, event + 1, event, want)

    def _memory(self, size: int) -> Iterator[Expectation]:
        addr = self.number("address")
        if size == 8 and addr % 8:
            self.fail(f"{addr:#x} is not a multiple of 8")
        self.want("=")
        want: dict[str, Any] = {"value": None if self.got("unknown") else self.number("value", 8 * size)}
        if self.got("by"):
            writers = [None if self.got("initial") else self.event()]
            while self.got(","):
                writers.append(None if self.got("initial") else self.event())
            if len(writers) not in (1, size):
                self.fail(f"`by` takes one writer, or {size}, that of the lowest byte first")
            want["by"] = writers * (size // len(writers))
        yield Expectation("word" if size == 8 else "byte", self.line, self.position(), addr, want)

    def _word(self) -> Iterator[Expectation]:
        return self._memory(8)

    def _byte(self) -> Iterator[Expectation]:
        return self._memory(1)

    def _open(self) -> Iterator[Expectation]:
        position = self.position()
        self.want(":")
        frames: list[tuple[int, str | None]] = []
        if not self.got("none"):
            while True:
                entry = self.event()
                status = self.take() if self.words and self.words[0] in words_of(FrameStatus) else None
                frames.append((entry, status))
                if not self.got(","):
                    break
        yield Expectation("open", self.line, position, None, {"frames": frames})

    def _state(self) -> Iterator[Expectation]:
        cpu = 0
        if self.got("cpu"):
            cpu = self.number("cpu", 16)
        elif self.case.trace.cpus > 1:
            self.fail("which CPU?")
        if cpu >= self.case.trace.cpus:
            self.fail(f"there is no CPU {cpu}")
        position = self.position()
        self.want(":")
        want: dict[str, Any] = {}
        while True:
            name = self.take("a field").replace("-", "_")
            if name not in STATE_FIELDS:
                self.fail(f"no field {shown(name)} (known: {', '.join(sorted(STATE_FIELDS))})")
            if name in want:
                self.fail(f"{name} is there twice")
            if self.got("?"):
                want[name] = None
            elif name == "shadow":
                want[name] = self.choice(words_of(Shadow), name)
            elif name in BOOL_FIELDS:
                want[name] = self.want("yes", "no") == "yes"
            elif name in EVENT_FIELDS:
                want[name] = self.event_or_none()
            else:
                want[name] = self.number(name)
            if not self.got(","):
                break
        yield Expectation("state", self.line, position, cpu, want)

    def _finding(self) -> Iterator[Expectation]:
        rule = self.choice(case_text.RULE_IDS, "finding")
        self.want("at")
        event = self.event()
        want: dict[str, Any] = {"rule": rule}
        if self.words:
            self.want(":")
        given: set[str] = set()
        while self.words:
            name = self.take()
            if name in given:
                self.fail(f"{name} is there twice")
            given.add(name)
            want.update(self._fact(name, rule))
        yield Expectation("finding", self.line, event + 1, (rule, event), want)

    def _fact(self, name: str, raised: Rule) -> dict[str, Any]:  # noqa: RET503 (fail() raises)
        slots = {slot: 1 << n for n, slot in enumerate(x86.SLOT_NAMES)}
        if name in ("victim", "writer", "consumer", "cause-event", "cause-frame", "settled"):
            return {name.replace("-", "_"): self.event_or_none()}
        if name == "as":
            return {"rule": self.choice(case_text.RULE_IDS, name)}
        if name == "bytes":
            return dict(zip(("lo", "hi"), self.range(), strict=True))
        if name in ("slots", "differ"):
            return {name: sum(set(self.some(slots, name)))}
        if name in ("evidence", "settled-evidence"):
            return {name.replace("-", "_"): self.choice(words_of(Evidence), name)}
        if name == "cause":
            return {name: self.choice(words_of(Cause), name)}
        if name == "settled-by":
            return {"settled_by": None if self.got("none") else self.choice(words_of(Settle), name)}
        if name == "severity":
            return {name: self.choice({s: s for s in rules.SEVERITIES}, name)}
        if name in ("count", "cpu"):
            return {name: self.number(name, 32)}
        if name == "detail":
            if raised in (Rule.SHUTDOWN, Rule.TRIPLE_FAULT) and self.words and not self.words[0][0].isdigit():
                return {name: int(self.choice(words_of(ShutdownReason), name))}
            if raised is Rule.MODEL_MISMATCH and self.words and not self.words[0][0].isdigit():
                return {name: sum(set(self.some({word_of(m): int(m) for m in Mismatch}, name)))}
            return {name: self.number(name, 16)}
        self.fail(f"a finding has no {shown(name)}")

    def _verdict(self) -> Iterator[Expectation]:
        if any(e.kind == "verdict" for e in self.case.expect):
            self.fail("a second verdict")
        yield Expectation("verdict", self.line, self.case.trace.count, None, {"verdict": self.want(*VERDICTS)})


KINDS = ("option", "frame", "word", "byte", "open", "state", "finding", "verdict")
