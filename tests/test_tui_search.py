"""Finding things in the viewer: what the words mean, `/`, `&` and `s`."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from contextlib import contextmanager
from typing import Any

import pytest
from samples import DO_NMI, LAYOUT, SYMBOLS, fill_race, race
from test_tui import Screen, drive
from test_tui_session import SlowReplay, running, views
from textual.events import Key
from textual.widgets import Input

from tracedbg.describe import Words
from tracedbg.errors import UsageError
from tracedbg.filter import Filter, Filters, Tally
from tracedbg.layout import Gate, Idt, Layout
from tracedbg.replay import Replay
from tracedbg.state import EventFlag, Kind, Known, Source
from tracedbg.symbols import Symbols
from tracedbg.trace import Trace
from tracedbg.tui.app import TraceApp
from tracedbg.tui.hidden import Hidden, noise_vectors
from tracedbg.tui.matches import Matches
from tracedbg.tui.search import parse_filters
from tracedbg.tui.session import Found, Match, Searching, Seek
from tracedbg.tui.tasks import Counted, Matched, MatchTask, TallyTask
from tracedbg.writer import TraceWriter, build

NAMES = Symbols(
    [(0x1000, 0x1100, "do_nmi"), (0x1100, 0x1200, "do_nmi_late"), (0x3000, 0x3010, "std::max(int, int)"),
     (0x4000, 0x4010, "probe [scsi_mod]"), (0x5000, 0x5010, "probe")]
)  # fmt: skip
VECTOR = frozenset({Kind.DELIVER, Kind.RAISE, Kind.GATE})
TOP = 1 << 64

# -- words --------------------------------------------------------------------------------------------------------------


def vector(*numbers: int) -> Filter:
    return Filter(VECTOR, frozenset(numbers), frozenset(Source) - {Source.SYSCALL})


def ranges(*pairs: tuple[int, int]) -> Filter:
    return Filter(ranges=pairs)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ()),
        ("  ", ()),
        ("nmi", (vector(2),)),
        ("NMI", (vector(2),)),
        ("#PF", (vector(14),)),
        ("pf", (vector(14),)),
        ("0x0e", (vector(14),)),
        ("14", (vector(14),)),
        ("vec:14", (vector(14),)),
        ("nmi,#mc,0xec", (vector(2, 18, 0xEC),)),
        ("deliver", (Filter(frozenset({Kind.DELIVER})),)),
        ("write,read", (Filter(frozenset({Kind.WRITE, Kind.READ})),)),
        ("store", (Filter(frozenset({Kind.WRITE})),)),
        ("msr", (Filter(frozenset({Kind.MSR})),)),
        ("iret", (Filter(frozenset({Kind.RETURN}), frozenset({0})),)),
        ("failed", (Filter(flags=EventFlag.FAILED),)),
        ("src:extint", (Filter(frozenset({Kind.DELIVER, Kind.RAISE}), sources=frozenset({Source.EXTINT})),)),
        ("src:nmi,mc", (Filter(frozenset({Kind.DELIVER, Kind.RAISE}), sources=frozenset({Source.NMI, Source.MC})),)),
        ("src:soft-int", (Filter(frozenset({Kind.DELIVER, Kind.RAISE}), sources=frozenset({Source.SOFT_INT})),)),
        ("cpu:3", (Filter(cpus=frozenset({3})),)),
        ("cpu:0,2-4", (Filter(cpus=frozenset({0, 2, 3, 4})),)),
        ("0x123", (ranges((0x123, 0x124)),)),
        ("0x1000-0x2000", (ranges((0x1000, 0x2000)),)),
        ("0x1000+8", (ranges((0x1000, 0x1008)),)),
        ("0x1000+0x10", (ranges((0x1000, 0x1010)),)),
        ("ffff8300bffd2f48", (ranges((0xFFFF8300BFFD2F48, 0xFFFF8300BFFD2F49)),)),
        ("0xffffffffffffffff", (ranges((TOP - 1, TOP)),)),
        ("do_nmi", (ranges((0x1000, 0x1100)),)),
        ("do_nmi*", (ranges((0x1000, 0x1200)),)),
        ("do_n", (ranges((0x1000, 0x1200)),)),
        ("do_nmi+0x10", (ranges((0x1010, 0x1011)),)),
        ("do_nmi_late,do_nmi", (ranges((0x1000, 0x1200)),)),
        ("probe", (ranges((0x4000, 0x4010), (0x5000, 0x5010)),)),
        ('"std::max(int, int)"', (ranges((0x3000, 0x3010)),)),
        ("std::max", (ranges((0x3000, 0x3010)),)),
        ("sym:do_nmi", (ranges((0x1000, 0x1100)),)),
        ("rip:do_nmi", (Filter(ranges=((0x1000, 0x1100),), fields=Known.RIP),)),
        ("value:14", (Filter(ranges=((14, 15),), fields=Known.VALUE),)),
        ("nmi cpu:1", (vector(2), Filter(cpus=frozenset({1})))),
    ],
)
def test_words(text: str, wanted: Filters) -> None:
    assert parse_filters(text, NAMES) == wanted


def test_an_exclamation_mark_inverts_the_word_after_it() -> None:
    def inverted(text: str) -> list[bool]:
        return [f.invert for f in parse_filters(text, NAMES)]

    assert inverted("!nmi") == inverted("! nmi") == [True]
    assert inverted("!!nmi") == [False]
    assert inverted("!nmi cpu:1 !write") == [True, False, True]


@pytest.mark.parametrize(
    "text",
    [
        "!", "nmi !", ",", "cpu:", "cpu:x", "cpu:3-1", "cpu:9999", "cpu:-1", "src:", "src:foo", "300", "vec:300", "#xx",
        "0x20-0x10", "0x1000-", "0x1000-zz", "0xffffffffffffffff+2", "nosuch", "do_nmi+0x5000", '"open', "nmi,write", "nmi,cpu:3",
        "kind:nmi",
        "\x1b[31m", "\uff11\uff14", "nmi " * 40, "*", '""', "99999999999999999999999",
    ],
)
def test_what_means_nothing_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_filters(text, NAMES)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300


def test_random_texts_are_parsed_or_refused() -> None:
    r = random.Random(5)
    parts = ["nmi", "!", ",", " ", "cpu:", "0x", "ff", "-", "+", '"', "do_nmi", "src:", "rip:", "*", "12", "\u0661", "write", ":"]
    for _ in range(3000):
        text = "".join(r.choice(parts) for _ in range(r.randint(1, 8)))
        try:
            filters = parse_filters(text, NAMES)
        except UsageError:
            continue
        for f in filters:
            edges = [edge for pair in f.ranges or () for edge in pair]
            assert edges == sorted(edges) and all(0 <= edge <= TOP for edge in edges)


def test_noise_is_few_vectors_with_nearly_all_deliveries() -> None:
    def noise(layout: Layout | None = None, **counts: int) -> set[int]:
        vectors = {int(name[1:], 16): n for name, n in counts.items()}
        return set(noise_vectors(Tally(sum(vectors.values()), vectors, {}, {}), layout or Layout()))

    assert noise(xec=950, x2=30, xe=20) == {0xEC}
    assert noise(xec=500, xef=420, x2=80) == {0xEC, 0xEF}
    assert noise(xec=900, xef=60, x2=40) == {0xEC, 0xEF}  # exactly 90 % is not more
    assert noise(**{f"x{n:x}": 10 for n in range(0x20, 0x40)}) == set()
    assert noise(x2=990, xe=10) == set()  # NMIs are never noise
    assert noise(Layout(idts=(Idt(0, {0xEC: Gate(0, 8, 3)}),)), xec=99, x20=1) == set()  # nor is what has an IST stack
    assert noise() == set()


def test_what_is_hidden_as_filters() -> None:
    hidden = Hidden(frozenset({Source.EXTINT}), frozenset({1, 2}), frozenset({0xEC}))
    assert [f.invert for f in hidden.filters()] == [True] * 3
    assert hidden.text() == "1 source, 2 CPUs, 1 vector"
    assert Hidden().filters() == () and Hidden().text() == ""


def test_matches_are_rows() -> None:
    matches = Matches()
    assert len(matches) == 0 and matches.place(5) == (0, False)
    matches.add((array("I", [2, 3, 7]), array("I", [9])), 10, False)
    matches.add((), 15, False)
    matches.add((array("I", [20, 21]),), 30, True)
    assert [matches[row] for row in range(len(matches))] == [2, 3, 7, 9, 20, 21]
    assert [matches.place(event) for event in (0, 2, 4, 7, 8, 9, 10, 20, 21, 22)] == [
        (0, False), (0, True), (2, False), (2, True), (3, False), (3, True), (4, False), (4, True), (5, True), (6, False),
    ]  # fmt: skip
    for row in (-1, 6):
        with pytest.raises(IndexError):
            matches[row]


# -- the session --------------------------------------------------------------------------------------------------------

NMI = parse_filters("nmi", Symbols())


class SlowSearch(SlowReplay):
    """Nothing is ever found, but it takes a microsecond for each event to say so."""

    def scan(self, max_events: int) -> int:
        return 0

    def find_match(self, filters: Filters, start: int, direction: int = 1, limit: int = 1 << 62) -> int | None:
        self._work(min(limit, self.count - start))
        return None

    def collect(self, filters: Filters, start: int, room: int = 1 << 16, limit: int = 1 << 62) -> tuple[array[int], int]:
        after = min(start + limit, self.count)
        self._work(after - start)
        return array("I", [start]), after


def test_a_search_reports_how_far_it_is_and_gives_way() -> None:
    with running(SlowSearch()) as run:
        wish = Match(0, 1, "x", NMI)
        run.session.wish(wish)
        while not (told := [r for r in run.posted if isinstance(r, Searching)]):
            time.sleep(0.005)
        assert told[0].wish is wish and 0 < told[0].looked < told[0].total == SlowSearch.count
        run.session.wish(Seek(0, 0))
        assert run.session.idle.wait(10)
        assert views(run.posted) == [0]
        assert not [r for r in run.posted if isinstance(r, Found)]


def test_a_task_goes_on_between_wishes_and_is_replaced() -> None:
    with running(SlowSearch()) as run:
        first, second = MatchTask(NMI), MatchTask(NMI)
        run.session.start_task(first)
        time.sleep(0.02)
        run.session.start_task(second)
        run.session.wish(Seek(0, 0))
        while not views(run.posted):
            time.sleep(0.001)
        assert not run.session.idle.is_set()
        assert run.session.idle.wait(20)
        reports = [r for r in run.posted if isinstance(r, Matched)]
        assert [r.done for r in reports if r.serial == second.serial][-1]
        assert not any(r.done for r in reports if r.serial == first.serial)
        covered = [r.covered for r in reports if r.serial == second.serial]
        assert covered == sorted(covered) and len(covered) > 3 and covered[-1] == SlowSearch.count


def test_a_task_can_be_given_up() -> None:
    with running(SlowSearch()) as run:
        run.session.start_task(MatchTask(NMI))
        run.session.drop_task(MatchTask)
        assert run.session.idle.wait(10)
        assert not [r for r in run.posted if isinstance(r, Matched) and r.done]


def test_tasks_of_a_real_replay() -> None:
    with race(3) as trace:

        @contextmanager
        def opened() -> Any:
            with Replay(trace) as replay:
                yield replay

        from tracedbg.tui.session import Session

        posted: list[Any] = []
        session = Session(opened, trace.events, posted.append)
        session.start()
        try:
            session.start_task(MatchTask(NMI))
            session.start_task(TallyTask())
            assert session.idle.wait(10)
        finally:
            session.stop()
        blocks = [b.tolist() for r in posted if isinstance(r, Matched) for b in r.blocks]
        assert blocks == [[0, 3]]
        tally = next(r.tally for r in posted if isinstance(r, Counted) and r.done)
        assert tally == Tally(3, {2: 2, 18: 1}, {Source.NMI: 2, Source.MC: 1}, {0: 7})


# -- the screen ---------------------------------------------------------------------------------------------------------


def row(screen: Screen, name: str) -> str:
    """The switch of this name."""
    return next(line for line in screen.text().splitlines() if f"] {name} " in line)


async def type_in(screen: Screen, key: str, text: str) -> str:
    await screen.pilot.press(key)
    screen.app.query_one("#find", Input).value = text
    return await screen.press("enter")


def status(screen: Screen) -> str:
    return screen.text().splitlines()[-2]


def noisy() -> Trace:
    """1,000 timer interrupts of two CPUs, among them an NMI with a #PF in its handler."""

    def fill(writer: TraceWriter) -> None:
        writer.symbols = SYMBOLS
        writer.layout = LAYOUT
        for n in range(1000):
            rip = DO_NMI if n % 100 == 50 else 0x1000
            writer.event(Kind.DELIVER, cpu=n % 2, rip=rip, arg=0xEC, source=Source.FIXED)
            if n == 500:
                writer.event(Kind.DELIVER, cpu=0, rip=0x2000, arg=2, source=Source.NMI)
                writer.event(Kind.DELIVER, cpu=0, rip=DO_NMI, arg=14, source=Source.EXCEPTION, value=0xDEAD000)
        writer.event(Kind.GAP, value=3)

    return build(fill, cpus=2)


def test_keys_typed_ahead_go_to_the_prompt() -> None:
    async def script(screen: Screen) -> None:
        for key in ("ampersand", "n", "m", "i", "enter"):  # all before the first is handled
            screen.app.post_message(Key(key, key if len(key) == 1 else None))
        await screen.press("f1", "escape")
        assert "& nmi" in screen.text()

    drive(race(6), script)


def test_search_and_its_repetition() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("g")
        await type_in(screen, "slash", "nmi")
        assert screen.app.selected == 501
        await screen.press("n")
        assert screen.app.selected == 501 and "no further match of nmi" in status(screen)
        await type_in(screen, "slash", "do_nmi cpu:0")
        assert screen.app.selected == 502
        await screen.press("n")
        assert screen.app.selected == 552  # the 550th timer interrupt and the two others
        await screen.press("N", "N")
        assert screen.app.selected == 450
        await screen.press("backspace")
        assert screen.app.selected == 502

    drive(noisy(), script)


def test_without_a_search_n_goes_to_findings_and_f_always_does() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("g", "n")
        assert screen.app.selected == 2  # the window
        await type_in(screen, "slash", "return")
        assert screen.app.selected == 4
        await screen.press("f")
        assert screen.app.selected == 5  # the loop
        await screen.press("n")
        assert screen.app.selected == 6  # the next return
        await screen.press("F", "F")
        assert screen.app.selected == 3
        await type_in(screen, "slash", "")
        assert "n and N go to findings" in status(screen)
        await screen.press("N")
        assert screen.app.selected == 2
        assert "nN finding" in screen.text()

    drive(race(6), script, size=(160, 36))


def test_a_bad_search_is_told_and_comes_back_from_the_history() -> None:
    async def script(screen: Screen) -> None:
        await type_in(screen, "slash", "nosuch[red]")
        assert "nosuch[red]" in status(screen) and "no symbol begins so" in status(screen)
        await type_in(screen, "slash", "iret")
        await screen.press("slash", "x", "up", "up")
        prompt = screen.app.query_one("#find", Input)
        assert prompt.value == "nosuch[red]"
        await screen.press("up", "down")
        assert prompt.value == "iret"
        await screen.press("down")
        assert prompt.value == "x"
        await screen.press("escape", "ampersand", "up")
        assert prompt.value == ""  # a history of its own
        await screen.press("escape", "k")
        assert screen.app.focused is not None and screen.app.focused.id == "events"

    drive(race(6), script)


def test_filter_shows_only_matches_with_their_numbers() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("g")
        text = await type_in(screen, "ampersand", "nmi,#pf")
        assert "filtered: 2 of 1,003" in text.splitlines()[0]
        assert "& nmi,#pf" in text
        shown = [line for line in text.splitlines() if "interrupt 0xec" in line.split("│")[0][:60]]
        assert len(shown) <= 2 and screen.line("(filtered out)").startswith("▶")  # the selected event itself
        await screen.press("j")
        assert screen.app.selected == 501 and "(filtered out)" not in screen.text()
        await screen.press("right")
        assert screen.app.selected == 502
        assert "cr2 0xdead000" in screen.text() or "dead000" in screen.text()
        await screen.press("right")
        assert screen.app.selected == 502 and "no further event that the filter shows" in status(screen)
        await screen.press("left", "left")
        assert screen.app.selected == 501 and "no earlier event that the filter shows" in status(screen)
        for event in (99, 100):
            await screen.goto(str(event))
            assert screen.app.selected == event and screen.line("(filtered out)").startswith(f"▶{event:>6} ")
        await screen.press("right")
        assert screen.app.selected == 501
        text = await type_in(screen, "ampersand", "")
        assert "filtered" not in text and "all events are shown" in status(screen)
        await screen.press("right")
        assert screen.app.selected == 502

    drive(noisy(), script)


def test_inverse_filter_and_search_within_it() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("g")
        assert "filtered: 3 of 1,003" in await type_in(screen, "ampersand", "!0xec")
        await type_in(screen, "slash", "do_nmi")  # many timer interrupts too
        assert screen.app.selected == 502
        await screen.press("n")
        assert "no further match of do_nmi that the filter shows" in status(screen)
        await screen.press("G")
        assert screen.app.selected == 1002 and "gap: 3 records lost" in screen.text()

    drive(noisy(), script)


def test_filter_that_nothing_passes() -> None:
    async def script(screen: Screen) -> None:
        text = await type_in(screen, "ampersand", "smi")
        assert "filtered: 0 of 4" in text and "no event passes the filter" in status(screen)
        assert screen.line("(filtered out)").startswith("▶")
        await screen.press("j", "k", "g", "G", "pagedown", "right", "left")
        assert screen.app.selected == 3

    drive(race(), script)


def test_findings_outside_the_filter_are_told_and_reached() -> None:
    async def script(screen: Screen) -> None:
        await type_in(screen, "ampersand", "nmi")
        assert "2 findings filtered out; f and F still go there" in status(screen)
        assert "2 findings filtered out" in screen.line("& nmi")
        await screen.press("f")
        assert screen.app.selected == 5 and "(filtered out)" in screen.line("[pops]")
        assert "event 5 of 10" in screen.text()
        await type_in(screen, "ampersand", "return,nmi")
        assert "a comma joins words of one sort" in status(screen) and "filtered: 2 of 10" in screen.text()
        await screen.press("ampersand")
        assert screen.app.query_one("#find", Input).value == "nmi"  # to go on from

    drive(race(6), script, size=(160, 36))


def test_filter_text_is_no_markup() -> None:
    async def script(screen: Screen) -> None:
        assert "& \"[red]x\"" in await type_in(screen, "ampersand", '"[red]x"')

    def fill(writer: TraceWriter) -> None:
        fill_race(writer)
        writer.symbols = SYMBOLS.replace(b"do_nmi", b"[red]x")

    drive(build(fill), script, size=(160, 36))


def test_click_in_a_filtered_list_selects_the_event_of_the_row() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("G")
        await type_in(screen, "ampersand", "!0xec")
        await screen.pilot.click("#events", offset=(5, 2))
        await screen.press("escape")
        assert screen.app.selected == 502

    drive(noisy(), script)


def test_switches_hide_noise_sources_and_cpus() -> None:
    async def script(screen: Screen) -> None:
        text = await screen.press("s")
        assert "noise" in row(screen, "0xec") and "noise" not in row(screen, "0x02")
        assert "1,000 100 %" in row(screen, "local APIC")
        assert "cpu 1" in text
        await screen.press("n")
        assert "hidden" in row(screen, "0xec")
        text = await screen.press("escape")
        assert "filtered: 3 of 1,003" in text and "hidden: 1 vector" in text
        await screen.press("s", "n", "j", "j", "space")  # not the vector but the source of NMIs
        text = await screen.press("s")
        assert "hidden: 1 source" in text
        hidden = screen.app.hidden
        assert hidden.sources and not hidden.vectors and not hidden.cpus
        await screen.press("s", "a", "G", "space")  # the last line: CPU 1
        assert "filtered: 503 of 1,003" in await screen.press("q")  # those of CPU 0 and the gap of all CPUs
        await screen.press("s", "a")
        assert "all events are shown" in (await screen.press("escape"))
        assert screen.app.is_running

    drive(noisy(), script, size=(140, 40))


def test_switches_by_mouse_and_of_a_whole_group() -> None:
    async def script(screen: Screen) -> None:
        await screen.press("s")
        line = row(screen, "cpu 1")
        await screen.pilot.click(offset=(line.index("] cpu 1"), screen.text().splitlines().index(line)))
        assert "hidden" in row(screen, "cpu 1")
        await screen.press("k", "o")  # only CPU 0, which is the same
        assert "hidden" in row(screen, "cpu 1") and "hidden" not in row(screen, "cpu 0")
        await screen.press("k", "space")
        assert "hidden" not in row(screen, "cpu 1")
        await screen.press("space")
        assert "hidden" in row(screen, "cpu 1") and "hidden" in row(screen, "cpu 0")
        assert "filtered: 1 of 1,003" in await screen.press("escape")

    drive(noisy(), script, size=(140, 40))


def test_keys_in_an_empty_trace() -> None:
    async def script(screen: Screen) -> None:
        await type_in(screen, "slash", "nmi")
        await type_in(screen, "ampersand", "nmi")
        await screen.press("n", "N", "j", "k", "right", "s", "space", "o", "n", "a", "escape")
        assert "no events" in await type_in(screen, "ampersand", "")

    drive(build(lambda writer: None), script)


def test_escape_stops_a_search_that_takes_long() -> None:
    class Slow(Replay):
        def find_match(self, filters: Filters, start: int, direction: int = 1, limit: int = 1 << 62) -> int | None:
            time.sleep(0.02)
            return super().find_match(filters, start, direction, 0)

    def fill(writer: TraceWriter) -> None:
        writer.append(b"".join(bytes(60) + bytes([int(Kind.EOI), 0, 0, 0]) for _ in range(1000)) * 200)

    async def run() -> None:
        with build(fill) as trace:
            app = TraceApp(trace, Words(trace), open_replay=lambda: Slow(trace), start=1)
            async with app.run_test(size=(100, 30)) as pilot:
                screen = Screen(app, pilot)
                assert await asyncio.to_thread(app.session.idle.wait, 60)
                await pilot.press("slash")
                app.query_one("#find", Input).value = "nmi"
                await pilot.press("enter")
                for _ in range(200):
                    await pilot.pause(0.01)
                    if "(Esc stops)" in screen.text():
                        break
                assert "looking for a match of nmi: " in status(screen)
                assert "search stopped" in await screen.press("escape")
                assert app.selected == 0 and app.session.idle.is_set()

    asyncio.run(run())


@pytest.mark.parametrize("size", [(80, 24), (40, 12)])
def test_small_terminals(size: tuple[int, int]) -> None:
    async def script(screen: Screen) -> None:
        await screen.press("slash")
        assert screen.text().splitlines()[-2].startswith(" /search: nmi  #pf")
        await screen.press("escape")
        await type_in(screen, "ampersand", "nmi")
        assert "filtered" in screen.text() or size[0] < 80
        assert "NMIs" in await screen.press("s")
        assert all(len(line) <= size[0] for line in screen.text().splitlines())
        await screen.press("escape")

    drive(race(), script, size=size)
