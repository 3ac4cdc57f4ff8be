"""Messages between the session, the widgets and the app."""

from __future__ import annotations

from dataclasses import dataclass

from textual.message import Message

from tracedbg.tui.session import Report


@dataclass
class Reported(Message):
    """The session has something to tell."""

    report: Report
