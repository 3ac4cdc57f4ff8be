"""The picture: stacks as memory beside each other, the timeline of nesting, the strip of a CPU's state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from samples import CLOBBER, CS, DO_NMI, LAYOUT, NMI_RSP, SYMBOLS, race
from test_tui import Screen, drive
from textual import events

from tracedbg.layout import CpuTables, Layout, Tss
from tracedbg.state import Evidence, Kind, Rule, Source, Timeline
from tracedbg.trace import Trace
from tracedbg.tui.overview import LANES, Lane, Overview, Survey
from tracedbg.tui.stack_view import StackView
from tracedbg.tui.timeline import TimelineBar
from tracedbg.writer import TraceWriter, build

FAR = 0x100000  # between the stacks of two CPUs


def many_cpus(cpus: int) -> Trace:
    """Each CPU gets an NMI on its own IST2; then CPU 1 gets a #MC inside of its NMI."""
    first = LAYOUT.tss[0]

    def moved(n: int) -> Tss:
        def shift(values: tuple[int | None, ...]) -> tuple[int | None, ...]:
            return tuple(None if v is None else v + n * FAR for v in values)

        return Tss(first.base + n * 0x100, shift(first.rsp), shift(first.ist))

    layout = Layout(
        tss=tuple(moved(n) for n in range(cpus)), idts=LAYOUT.idts, cpus=tuple(CpuTables(n, 0) for n in range(cpus)),
        names=LAYOUT.names,
    ).with_stacks()  # fmt: skip

    def fill(writer: TraceWriter) -> None:
        writer.layout, writer.symbols = layout, SYMBOLS
        at = {"rip": DO_NMI, "rflags": 0x46, "cs": CS, "ss": 0}
        for n in range(cpus):
            writer.event(Kind.DELIVER, cpu=n, arg=2, source=Source.NMI, rsp=0xFFFF8300BFFD7E98 + n * FAR, **at)
        writer.event(Kind.DELIVER, cpu=1, arg=18, source=Source.MC, rsp=NMI_RSP + FAR, **at)

    return build(fill, cpus=cpus, name="cpus.tdbg")


def bar(screen: Screen) -> TimelineBar:
    return screen.app.query_one("#timeline", TimelineBar)


def timeline(screen: Screen) -> list[str]:
    region = bar(screen).region
    return screen.text().splitlines()[region.y : region.bottom]


def strip(screen: Screen) -> str:
    return screen.text().splitlines()[1]


# -- the whole screen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)])
def test_main_view(size: tuple[int, int], golden: Callable[[str, str], None]) -> None:
    shown: list[str] = []

    async def script(screen: Screen) -> None:
        shown.extend(screen.text().splitlines()[:-1])  # the footer tells the keys of all parts

    drive(race(3), script, size=size)
    golden(f"tui-main-{size[0]}x{size[1]}.txt", "\n".join(shown) + "\n")


# -- stacks ---------------------------------------------------------------------------------------------------------------


def test_stacks_stand_beside_each_other_where_there_is_room() -> None:
    async def script(screen: Screen) -> None:
        head = screen.line("═ IST1 (MC)")
        assert head.index("═ IST1 (MC)") < head.index("┃═ IST2 (NMI), 2 open, in use")
        rip = screen.line("◀ RSP")
        assert f"{DO_NMI:x} rip    NMI@3" in rip and "do_nmi+2" in rip
        was = screen.line("until event 3")
        assert "✗      was ffff82d0402f9c06 default_idle+0xc6" in was
        assert was.index("ffff82d0402f9c06") == rip.index(f"{DO_NMI:x} rip    NMI@3")  # digit below digit
        assert "= same value" in screen.line("000000000000e008 cs     NMI@3")

    def only_rip(writer: TraceWriter) -> None:
        writer.layout, writer.symbols = LAYOUT, SYMBOLS
        at = {"cpu": 0, "rsp": NMI_RSP, "rflags": 0x46, "cs": CS, "ss": 0}
        writer.event(Kind.DELIVER, arg=2, source=Source.NMI, rip=0xFFFF82D0402F9C06, **at)
        writer.event(Kind.DELIVER, arg=18, source=Source.MC, rip=DO_NMI, **at)
        writer.event(Kind.RETURN, cpu=0, rsp=LAYOUT.tss[0].ist[1] - 40, addr=DO_NMI, value=NMI_RSP, rflags=0x46, cs=CS, ss=0)
        writer.event(Kind.DELIVER, arg=2, source=Source.NMI, rip=DO_NMI, **at)

    drive(build(only_rip), script, size=(200, 50))


def test_keys_and_clicks_go_from_stack_to_stack() -> None:
    async def script(screen: Screen) -> None:
        stacks = screen.app.query_one(StackView)
        stacks.focus()
        assert "Stacks · 2 of 2" in screen.text()
        assert "Stacks · 1 of 2" in await screen.press("less_than_sign")
        assert "Stacks · 1 of 2" in await screen.press("less_than_sign")  # there is none before it
        await screen.press("enter")
        assert screen.app.selected == 1  # who wrote the word of the #MC
        await screen.pilot.click(StackView, offset=(100, 5))
        assert "Stacks · 2 of 2" in screen.text()

    drive(race(), script, size=(200, 50))


def test_the_second_line_of_an_overwritten_word_leads_to_the_one_who_lost_it() -> None:
    async def script(screen: Screen) -> None:
        stacks = screen.app.query_one(StackView)
        stacks.focus()
        await screen.press("j")
        row = stacks.row(stacks.cursor)
        assert row is not None and row.old == "000000000000e010"
        await screen.press("enter")
        assert screen.app.selected == 0

    drive(race(), script, size=(200, 50))


def test_stacks_below_each_other_are_walked_with_the_same_keys() -> None:
    async def script(screen: Screen) -> None:
        screen.app.query_one(StackView).focus()
        assert "═ IST1 (MC)" not in screen.text() and "Stacks · 1 of 2" in screen.text()
        text = await screen.press("greater_than_sign")
        assert "═ IST1 (MC)" in text and "Stacks · 2 of 2" in text
        assert "Stacks · 1 of 2" in await screen.press("less_than_sign")

    drive(race(), script, size=(80, 24))


def test_the_bottom_of_a_stack_says_how_it_is_known() -> None:
    def sized(writer: TraceWriter) -> None:
        fill(writer)
        writer.layout = replace(LAYOUT, regions=tuple(replace(r, assumed=False) for r in LAYOUT.regions))

    def fill(writer: TraceWriter) -> None:
        writer.layout = LAYOUT
        writer.event(Kind.DELIVER, cpu=0, arg=2, source=Source.NMI, rip=DO_NMI, rsp=NMI_RSP, rflags=2, cs=CS, ss=0)

    async def known(screen: Screen) -> None:
        text = screen.line("▔▔ bottom")
        assert "ffff8300bffd2000, 4,056 bytes below RSP" in text

    async def assumed(screen: Screen) -> None:
        assert "▔▔ assumed bottom ffff8300bffd2000 (a usual size)" in screen.text()

    drive(build(sized), known, size=(120, 40))
    drive(build(fill), assumed, size=(120, 40))


def test_stacks_of_another_cpu_on_request() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("g")
        assert "Stacks · cpu 0" in screen.text() and strip(screen).startswith(" cpu 0  ")
        text = await screen.press("c", "c")
        assert "Stacks · cpu 1, not the event's" in text and strip(screen).startswith(" cpu 1  ")
        text = await screen.press("j")
        assert "Stacks · cpu 1 · " in text or "Stacks · cpu 1─" in text  # the event of cpu 1
        assert "Stacks · cpu 1, not" in await screen.press("j")
        assert "Stacks · cpu 2" in await screen.press("C", "C")  # those of the event again

    drive(many_cpus(3), script)


def test_one_cpu_has_no_other() -> None:
    async def script(screen: Screen) -> None:
        assert "the trace has one CPU" in await screen.press("c")

    drive(race(), script)


# -- the strip ------------------------------------------------------------------------------------------------------------


def test_the_strip_marks_what_the_event_changed() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("g", "j")
        assert strip(screen) == " cpu 0  CPL 0  IF 0  NMIs blocked since 0  *MCIP 1  *IST1 (MC) 40 bytes deep"
        await screen.press("j")  # the IRET of the #MC: back on the stack of the NMI
        assert strip(screen) == f" cpu 0  CPL 0  IF 0  *NMIs not blocked  MCIP 1  *IST2 (NMI) {0x3000 - 0x2F48} bytes deep"

    drive(race(), script)


def test_the_strip_says_what_ended() -> None:
    def fill(writer: TraceWriter) -> None:
        writer.event(Kind.SMI, cpu=0)
        writer.event(Kind.RSM, cpu=0)
        writer.event(Kind.MARK, cpu=0)

    async def script(screen: Screen) -> None:
        await screen.press("g")
        assert "*SMM" in strip(screen)
        await screen.press("j")
        assert "*no longer SMM" in strip(screen)
        await screen.press("j")
        assert "SMM" not in strip(screen)

    drive(build(fill), script)


# -- the timeline ---------------------------------------------------------------------------------------------------------


def test_the_timeline_shows_nesting_findings_and_the_place() -> None:
    """Seven events on seventy columns; one frame open is half of two."""

    async def script(screen: Screen) -> None:
        # NMI 1, #MC 2, IRET 1 (window), NMI 2 (overwrites), IRET 1, IRET (of the lost frame) 0, IRET 0.
        assert screen.text().splitlines()[2] == (
            " cpu 0    " + "▄" * 10 + "█" * 10 + "!" + "▄" * 8 + "▐✗▌" + "█" * 8 + "▄" * 10 + "✗"
        )
        await screen.press("g")
        assert screen.text().splitlines()[2].startswith(" cpu 0    ▄▌" + "▄" * 8 + "█" * 10)

    drive(race(3), script, size=(80, 24))


def test_the_timeline_has_a_scale_where_there_is_room() -> None:
    async def script(screen: Screen) -> None:
        scale, line = timeline(screen)
        assert scale.startswith(" ≤2 deep  ") and scale.index("▼") == line.index("✗") and "50%" in scale

    drive(race(3), script, size=(80, 30))


def test_keys_on_the_timeline() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press("t")
        assert "timeline: event 3: nesting up to 2, 1 delivery, 1 finding" in text
        assert "event 4 of 7" in await screen.press("right")
        assert "event 2 of 7" in await screen.press("h", "h")
        assert "event 6 of 7" in await screen.press("end")
        assert "event 6 of 7" in await screen.press("l")
        assert "event 0 of 7" in await screen.press("home")
        assert "event 0 of 7" in await screen.press("left")
        assert "event 1 of 7" in await screen.press("j")  # steps as everywhere
        assert "event 6 of 7" in await screen.press("pagedown")
        assert "timeline:" not in await screen.press("t")
        assert screen.app.focused is not None and screen.app.focused.id == "events"

    drive(race(3), script, size=(80, 24))


def test_clicks_and_drags_on_the_timeline() -> None:
    async def script(screen: Screen) -> None:
        await screen.pilot.click(TimelineBar, offset=(10 + 12, 0))
        assert "event 1 of 7" in await screen.press()
        await screen.pilot.mouse_down(TimelineBar, offset=(10 + 41, 0))
        await screen.pilot.hover(TimelineBar, offset=(10 + 55, 0))
        assert "event 5 of 7" in await screen.press()
        await screen.pilot.hover(TimelineBar, offset=(10 + 69, 0))
        await screen.pilot.mouse_up(TimelineBar, offset=(10 + 69, 0))
        await screen.pilot.hover(TimelineBar, offset=(10 + 5, 0))  # no button is down
        assert "event 6 of 7" in await screen.press()
        assert "event 1 of 7" in await screen.press("backspace")  # a drag is one jump

    drive(race(3), script, size=(80, 24))


def test_the_wheel_on_the_timeline_goes_by_columns() -> None:
    async def script(screen: Screen) -> None:
        where = {"x": 30, "y": 0, "delta_x": 0, "delta_y": 1, "button": 0, "shift": False, "meta": False, "ctrl": False}
        bar(screen).post_message(events.MouseScrollDown(bar(screen), **where))
        await screen.pilot.pause()
        assert screen.app.selected == 4
        bar(screen).post_message(events.MouseScrollUp(bar(screen), **where))
        await screen.pilot.pause()
        assert screen.app.selected == 3

    drive(race(3), script, size=(80, 24))


@pytest.mark.parametrize(
    ("cpus", "lines", "names"),
    [
        (2, 24, ["all CPUs"]), (2, 36, [" cpu 0", "▸cpu 1"]), (6, 40, ["all CPUs", " cpu 0", "▸cpu 1", " cpu 2"]),
        (6, 60, [" cpu 0", "▸cpu 1", *(f" cpu {n}" for n in (2, 3, 4, 5))]),
    ],
)  # fmt: skip
def test_lanes_fold_where_there_is_no_room(cpus: int, lines: int, names: list[str]) -> None:
    async def script(screen: Screen) -> None:
        await screen.press("G")
        labels = [line[:10] for line in timeline(screen)]
        if len(labels) > 1:
            assert labels.pop(0).strip() == "≤2 deep"
        assert [label.rstrip() for label in labels] == [f" {name}" if name == "all CPUs" else name for name in names]

    drive(many_cpus(cpus), script, size=(100, lines))


def test_gaps_are_marked() -> None:
    def fill(writer: TraceWriter) -> None:
        for _ in range(6):
            writer.event(Kind.MARK, cpu=0)
        writer.event(Kind.GAP, cpu=0)

    async def script(screen: Screen) -> None:
        assert timeline(screen) == [" cpu 0     ▌" + " " * 58 + "░"]

    drive(build(fill), script, size=(80, 24), start=1)


def test_what_is_not_scanned_yet_is_no_nesting() -> None:
    async def script(screen: Screen) -> None:
        lane = Lane(0, Timeline(1, *((0,) * 8,) * 3, (1, 2, 0, 0, 0, 0, 0, 0)), bytes(8))
        bar(screen).show_overview(Overview(8, 4, 8, (lane, lane)))
        cells = "".join(cell.glyph for cell in bar(screen).cells(lane))
        assert cells[:36] == "▄" * 9 + "█" * 9 + " " * 17 + "╌"
        assert set(cells[36:]) == {"╌"}
        bar(screen).set_position(6, 0)
        assert bar(screen).tell() == "event 6: not scanned yet"

    drive(race(3), script, size=(80, 24))


# -- the survey -----------------------------------------------------------------------------------------------------------


class Flat:
    """A replay in which nothing nests."""

    def __init__(self, count: int) -> None:
        self.count = self.scanned = count

    def timeline(self, cpu: int | None, buckets: int, first: int = 0, count: int | None = None) -> Timeline:
        return Timeline(1, *((0,) * buckets,) * 4)


def test_a_bucket_has_the_gravest_of_its_findings() -> None:
    survey = Survey(10_000, 2)
    note = replace(CLOBBER, rule=Rule.TRACE_GAP, raised_rule=Rule.TRACE_GAP)
    doubtful = replace(CLOBBER, evidence=Evidence.INFERRED)  # a warning
    survey.take([replace(CLOBBER, event=1), replace(note, event=0), replace(doubtful, event=9999, cpu=1)])
    overview = survey.overview(Flat(10_000))
    assert overview is not None and overview.buckets == 2048
    every, first, second = overview.lanes
    assert (every.ranks[0], every.ranks[-1]) == (3, 2)
    assert (first.ranks[0], first.ranks[-1]) == (3, 0)
    assert (second.ranks[0], second.ranks[-1]) == (0, 2)
    survey.reset(10_000)
    assert survey.overview(Flat(10_000)).lanes[0].ranks == bytes(2048)  # type: ignore[union-attr]


def test_buckets_begin_where_their_first_event_is() -> None:
    for count in (1, 7, 2048, 2049, 5000, 20_000_000):
        overview = Survey(count, 1).overview(Flat(count))
        assert overview is not None
        for bucket in (0, overview.buckets // 3, overview.buckets - 1):
            first = overview.first(bucket)
            assert overview.bucket(first) == bucket
            assert first == 0 or overview.bucket(first - 1) == bucket - 1


def test_of_many_cpus_those_with_findings_have_lanes() -> None:
    survey = Survey(100, 4096)
    survey.take([replace(CLOBBER, event=5, cpu=4000)])
    overview = survey.overview(Flat(100))
    assert overview is not None
    assert [lane.cpu for lane in overview.lanes] == [None, *range(LANES - 1), 4000]


def test_a_trace_without_events_has_no_survey() -> None:
    assert Survey(0, 1).overview(Flat(0)) is None


def test_an_empty_trace_has_an_empty_timeline() -> None:
    async def script(screen: Screen) -> None:
        assert "no events" in await screen.press("t", "right", "home")
        await screen.pilot.click(TimelineBar, offset=(20, 0))
        await asyncio.sleep(0)
        assert screen.text().splitlines()[2] == ""

    drive(build(lambda writer: None), script, size=(80, 24))
