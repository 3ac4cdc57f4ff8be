"""The state of one CPU in a line: what decides which event can come next, and what the selected event changed of it."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.widgets import Static

from tracedbg import x86
from tracedbg.describe import Words
from tracedbg.state import CpuState, Position, Shadow, Stack
from tracedbg.tui.session import View

CHANGED = "*"
_UNKNOWN = "?"
_SHADOWS = {Shadow.STI: "STI shadow", Shadow.MOV_SS: "MOV SS shadow"}

Fields = list[tuple[str, str]]


def cpu_fields(cpu: CpuState) -> Fields:
    """Names and texts; what is as on most CPUs at most times has no text."""
    cpl = _UNKNOWN if cpu.cs is None else x86.cpl(cpu.cs)
    flag = _UNKNOWN if cpu.rflags is None else int(bool(cpu.rflags & x86.RFLAGS_IF))
    mcip = {None: _UNKNOWN, False: "0", True: "1"}[cpu.mcip]
    return [("cpl", f"CPL {cpl}"), ("if", f"IF {flag}"), ("nmi", _nmi(cpu)), ("mcip", f"MCIP {mcip}"), *_unusual(cpu)]


def cpu_summary(cpu: CpuState) -> str:
    """The same as a text."""
    return " · ".join((f"cpu {cpu.cpu}", *(text for _, text in cpu_fields(cpu) if text)))


def _unusual(cpu: CpuState) -> Fields:
    busy = [n for n in range(1, 8) if cpu.tokens_busy >> n & 1]
    kernel = cpu.cs is not None and x86.cpl(cpu.cs) == 0
    parts = (
        ("fred", cpu.fred, f"FRED level {_UNKNOWN if cpu.csl is None else cpu.csl}"),
        ("ring gap", cpu.ring_gap is not None, "in the SYSCALL gap"),
        ("gs", kernel and cpu.kernel_gs is False, "GS user's"),
        ("mce", cpu.mce is False, "MCE 0"),
        ("gif", cpu.gif is False, "GIF 0"),
        ("tpr", cpu.tpr, f"TPR {cpu.tpr or 0:#04x}"),
        ("token", busy, f"token {' '.join(f'IST{n}' for n in busy)} busy"),
        ("shadow", cpu.shadow, _SHADOWS.get(cpu.shadow, "")),
        ("smm", cpu.smm, "SMM"),
        ("guest", cpu.guest, "guest"),
    )
    return [(name, text if there else "") for name, there, text in parts]


def _nmi(cpu: CpuState) -> str:
    if cpu.nmi_blocked is None:
        return "NMIs ?"
    text = "NMIs blocked" if cpu.nmi_blocked else "NMIs not blocked"
    if cpu.nmi_blocked and cpu.nmi_since is not None:
        text += f" since {cpu.nmi_since}"
    return text + (", one pending" if cpu.nmi_pending else "")


def stack_in_use(state: Position, cpu: CpuState) -> Stack | None:
    """The stack that RSP is on; of several with the same bytes one that is the CPU's own."""
    if cpu.rsp is None:
        return None
    on = [s for s in state.stacks if s.lo < cpu.rsp <= s.hi]
    return min(on, key=lambda s: (s.cpu != cpu.cpu, not s.named, s.hi - s.lo), default=None)


def _stack_field(cpu: CpuState, stack: Stack | None, words: Words) -> str:
    if cpu.rsp is None:
        return "RSP ?"
    if stack is None or not stack.named:
        return "RSP on no known stack"
    name = words.stack_title(stack).removesuffix(f" of cpu {cpu.cpu}")
    return f"{name} {stack.hi - cpu.rsp:,} bytes deep"


def strip_fields(view: View, words: Words) -> list[tuple[str, bool]]:
    """Texts of the state at a view, and whether the selected event changed each."""
    cpu = next((c for c in view.state.cpus if c.cpu == view.cpu), None)
    if cpu is None:
        return []
    result = [(f"cpu {cpu.cpu}", False)]
    now, was = _all_fields(view.state, cpu, words), dict(_all_fields(view.state, view.was, words)) if view.was is not None else {}
    for name, text in now:
        changed = view.was is not None and was.get(name) != text
        if text:
            result.append((text, changed))
        elif changed:
            result.append((f"no longer {was[name]}", True))  # what ended
    return result


def _all_fields(state: Position, cpu: CpuState, words: Words) -> Fields:
    fields = cpu_fields(cpu)
    return [*fields[:4], ("stack", _stack_field(cpu, stack_in_use(state, cpu), words)), *fields[4:]]


class StateStrip(Static):
    """The strip: what changed has a glyph and a colour."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"strip--changed"}

    def __init__(self, words: Words, *, id: str) -> None:
        super().__init__(id=id, markup=False)
        self._words = words

    def show_view(self, view: View) -> None:
        """Take the state of another position."""
        text = Text(no_wrap=self.size.height < 2, overflow="ellipsis")
        changed = self.get_component_rich_style("strip--changed", partial=True)
        for number, (field, new) in enumerate(strip_fields(view, self._words)):
            text.append(" " if not number else "  ")
            text.append(f"{CHANGED}{field}" if new else field, changed if new else "bold" if not number else "")
        self.update(text, layout=False)
