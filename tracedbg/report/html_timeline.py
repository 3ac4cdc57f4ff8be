"""The whole trace as a picture: a lane for each CPU with its open frames, deliveries, gaps and findings, as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracedbg.replay import Replay
from tracedbg.report import Result
from tracedbg.report.html_text import text
from tracedbg.state import Finding, Timeline

WIDTH, LEFT, RIGHT = 960, 70, 12  # of the picture
LANE, TOP, AXIS = 46, 14, 22  # heights: of a lane, of the marks above the curves in it, of the axis
MAX_LANES = 16
MAX_MARKS = 400  # findings drawn
BUCKETS = 240


def figure(result: Result, replay: Replay, groups: Sequence[Sequence[Finding]], anchors: Sequence[str]) -> Iterator[str]:
    """The picture with its legend; `anchors`: the id of the place where each group of findings is told."""
    if not replay.count:
        return
    cpus = _lanes(result)
    yield "<figure>"
    yield from _svg(result, replay, cpus, groups, anchors)
    more = result.trace.cpus - len(cpus)
    left_out = f" {more:,} more CPU{' is' if more == 1 else 's are'} not drawn." if more else ""
    yield (
        "<figcaption>Each lane is a CPU over all events: the height is the number of frames that are open, the pale area "
        f"behind it how many deliveries came, a triangle a finding, a pale bar a gap in the records.{left_out}</figcaption>"
    )
    yield "</figure>"


def _lanes(result: Result) -> list[int]:
    """The CPUs to draw: all, or first those with findings."""
    found = {finding.cpu for finding in result.findings}
    order = sorted(range(result.trace.cpus), key=lambda cpu: (cpu not in found, cpu))
    return sorted(order[:MAX_LANES])


def _svg(
    result: Result, replay: Replay, cpus: Sequence[int], groups: Sequence[Sequence[Finding]], anchors: Sequence[str]
) -> Iterator[str]:
    count = replay.count
    height = LANE * len(cpus) + AXIS
    yield f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="timeline of the trace">'
    lanes = [(cpu, replay.timeline(cpu, min(BUCKETS, count))) for cpu in cpus]
    deepest = max(1, *(max(line.depths, default=0) for _, line in lanes))
    busiest = max(1, *(max(line.deliveries, default=0) for _, line in lanes))
    for number, (cpu, line) in enumerate(lanes):
        base = LANE * (number + 1)
        yield f'<text x="0" y="{base - 4}">cpu {cpu}</text>'
        yield _area("rate", line.deliveries, busiest, base)
        yield _area("area", line.depths, deepest, base)
        yield from _gaps(line, base)
        yield f'<line class="base" x1="{LEFT}" y1="{base}" x2="{WIDTH - RIGHT}" y2="{base}"/>'
        yield f'<text x="{LEFT - 6}" y="{base - LANE + TOP + 6}" text-anchor="end">{deepest}</text>'
    yield from _marks(result, count, cpus, groups, anchors)
    if result.position is not None:
        x = _x(result.position, count)
        yield f'<line class="at" x1="{x}" y1="0" x2="{x}" y2="{height - AXIS}"><title>shown position</title></line>'
    for event, anchor in ((0, "start"), (count // 2, "middle"), (count, "end")):
        yield f'<text x="{_x(event, count)}" y="{height - 6}" text-anchor="{anchor}">event {event:,}</text>'
    yield "</svg></div>"


def _x(event: int, count: int) -> str:
    return _number(LEFT + (WIDTH - LEFT - RIGHT) * event / count)


def _number(value: float) -> str:
    """At most one decimal, so that the same picture is the same text."""
    return f"{value:.1f}".removesuffix(".0")


def _area(kind: str, values: Sequence[int], most: int, base: int) -> str:
    """A step curve over the base of a lane."""
    if not any(values):
        return ""
    step = (WIDTH - LEFT - RIGHT) / len(values)
    path = [f"M{LEFT} {base}"]
    last = 0
    for n, value in enumerate(values):
        if value != last:
            path.append(f"H{_number(LEFT + n * step)}V{_number(base - (LANE - TOP) * value / most)}")
            last = value
    path.append(f"H{WIDTH - RIGHT}V{base}Z")
    return f'<path class="{kind}" d="{"".join(path)}"/>'


def _gaps(line: Timeline, base: int) -> Iterator[str]:
    step = (WIDTH - LEFT - RIGHT) / max(len(line.gaps), 1)
    for n, gaps in enumerate(line.gaps):
        if gaps:
            yield (
                f'<rect class="gap" x="{_number(LEFT + n * step)}" y="{base - LANE + TOP}" width="{_number(max(step, 2))}" '
                f'height="{LANE - TOP}"><title>{gaps:,} gap{"" if gaps == 1 else "s"}</title></rect>'
            )


def _marks(
    result: Result, count: int, cpus: Sequence[int], groups: Sequence[Sequence[Finding]], anchors: Sequence[str]
) -> Iterator[str]:
    """A triangle for each finding, worst last, so that it lies on top. One of no known CPU stands in every lane."""
    marks = [(finding, anchor) for group, anchor in zip(groups, anchors, strict=True) for finding in group]
    for finding, anchor in reversed(marks[:MAX_MARKS]):
        x = float(_x(finding.event, count))
        for lane, cpu in enumerate(cpus):
            if finding.cpu not in (cpu, *((finding.cpu,) if finding.cpu >= result.trace.cpus else ())):
                continue
            y = LANE * lane + 3
            label = text(f"{result.severity(finding)}: {result.words.finding_place(finding)}")
            points = f"{_number(x - 5)},{y} {_number(x + 5)},{y} {_number(x)},{y + 9}"
            yield (
                f'<a href="#{anchor}"><polygon class="{result.severity(finding)}" points="{points}">'
                f"<title>{label}</title></polygon></a>"
            )
