"""The HTML report in a real browser: what is seen, that nothing is loaded or run, that nothing sticks out. Needs chromium."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from samples import fill_race

from tracedbg.writer import TraceWriter

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--log-level=0",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
FLAGSHIP = Path(__file__).parent.parent / "traces" / "xen-nmi-mce-nmi.tdbg"
EVIL = "<script>alert(1)</script>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def browse(tmp_path: Path, page: Path, *flags: str) -> tuple[str, list[str]]:
    """One run of the browser with a profile of its own: what it prints, and what the page said to the console."""
    profile = tmp_path / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    profile.mkdir()
    done = subprocess.run(
        [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()], capture_output=True, timeout=90, check=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(profile)},
    )  # fmt: skip
    said = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "CONSOLE" in line]
    return done.stdout.decode(), said


class Seen(HTMLParser):
    """Elements, attributes and text of what the browser made of the page."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._hidden = False
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._hidden = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data


def loads_nothing(page: str, seen: Seen) -> None:
    """No way in which a page loads something, or runs it."""
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<(?:script|link|img|iframe|object|embed|base)\b", page)
    for name, value in seen.attributes:
        assert name not in ("src", "srcset", "action", "formaction", "background", "poster", "data")
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href") or value.startswith("#")
    assert not seen.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}


def report(run_cli: Callable[..., Any], tmp_path: Path, *traces: Path) -> Path:
    run_cli("replay", "--exit-zero", "--format", "html", "-o", "page.html", *traces, code=0)
    return tmp_path / "page.html"


def test_the_page_of_the_race(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    page = report(run_cli, tmp_path, FLAGSHIP)
    dom, console = browse(tmp_path, page, "--dump-dom")
    assert not console
    seen = Seen(dom)
    loads_nothing(page.read_text(), seen)
    assert "verdict: 2 errors, 1 warning" in seen.text
    assert "NMI overwrote the frame of the NMI at event 2 (#569) on IST2 (40 bytes, rip..ss)" in seen.text
    # The words of the frame, its own and the nested one's.
    for word in ("ffff8300bffd2fd8", "ffff82d0402f9c06", "ffff82d04032a242", "ffff8300bffd7e98", "ffff8300bffd2f48", "do_nmi+2"):
        assert word in seen.text
    assert "polygon" in seen.tags
    links = {value[1:] for name, value in seen.attributes if name == "href"}
    assert links and links <= {value for name, value in seen.attributes if name == "id"}


def test_hostile_names_are_text(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    trace = tmp_path / 'a"><img src=x onerror=alert(1)>.tdbg'
    with TraceWriter(trace) as writer:
        fill_race(writer, returns=3)
        writer.symbols = f"ffff82d04032a240 ffff82d04032a440 {EVIL.replace(' ', '')}\n".encode()
        writer.meta = {
            "source": {"format": EVIL, "name": EVIL}, "layout": {"origin": EVIL, "file": f"'{EVIL}", "assumption": f'"{EVIL}'},
        }  # fmt: skip
    page = report(run_cli, tmp_path, trace)
    dom, console = browse(tmp_path, page, "--dump-dom")
    assert not console
    seen = Seen(dom)
    assert seen.text.count(EVIL) > 10
    assert "<img src=x onerror=alert(1)>" in seen.text
    loads_nothing(re.sub(r"&lt;[^;]*&gt;", "", page.read_text()), seen)


def test_the_console_would_be_heard(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>undefined_name()</script><p>text</p>")
    dom, console = browse(tmp_path, page, "--dump-dom")
    assert "<p>text</p>" in dom
    assert len(console) == 1 and "undefined_name is not defined" in console[0]


def pixels(path: Path) -> tuple[int, int, list[bytes]]:
    """Width, bytes a pixel and rows of a PNG of 8-bit colour (PNG specification, sections 9 and 11)."""
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed = 8, b""
    width = height = step = 0
    while at < len(raw):
        length, kind = struct.unpack_from(">I4s", raw, at)
        body = raw[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", body)
            assert (depth, interlaced) == (8, 0) and colour in (2, 6)
            step = 3 if colour == 2 else 4
        packed += body if kind == b"IDAT" else b""
        at += 12 + length
    data = zlib.decompress(packed)
    rows, last = [], bytes(width * step)
    for number in range(height):
        begin = number * (width * step + 1)
        rule, line = data[begin], bytearray(data[begin + 1 : begin + 1 + width * step])
        for n in range(len(line) if rule else 0):
            left, up = line[n - step] if n >= step else 0, last[n]
            corner = last[n - step] if n >= step else 0
            if rule == 4:
                guess = left + up - corner
                near = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
            else:
                near = (0, left, up, (left + up) // 2)[rule]
            line[n] = line[n] + near & 0xFF
        last = bytes(line)
        rows.append(last)
    return width, step, rows


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_sticks_out(tmp_path: Path, run_cli: Callable[..., Any], width: int) -> None:
    page = report(run_cli, tmp_path, FLAGSHIP)
    picture = tmp_path / "page.png"
    _, console = browse(tmp_path, page, f"--window-size={width},700", f"--screenshot={picture}")
    assert not console
    found, step, rows = pixels(picture)
    assert (found, len(rows)) == (width, 700)
    back = rows[0][:step]
    assert back == b"\xff\xff\xff\xff"[:step]
    margin = 12 * step  # the page has 24 pixels of padding
    assert all(row[:margin] == back * 12 and row[-margin:] == back * 12 for row in rows)
    colours = {row[n : n + step] for row in rows for n in range(0, len(row), step)}
    assert len(colours) > 50  # text, the severity's red, the marked rows
    assert bytes.fromhex("b3261e") in {colour[:3] for colour in colours}
