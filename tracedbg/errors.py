"""The errors that tracedbg raises on purpose; cli.py maps them to exit codes in one place."""

from __future__ import annotations


class TracedbgError(Exception):
    """Base of all errors that are told to the user in one line."""


class UsageError(TracedbgError):
    """The command line asks for something that cannot be done."""


class FormatError(TracedbgError):
    """Input that cannot be read.

    `path` is the file as the user named it, `offset` the byte where reading failed (None: the file as a whole).
    """

    def __init__(self, path: str, message: str, offset: int | None = None) -> None:
        self.path = path
        self.offset = offset
        self.message = message
        where = path if offset is None else f"{path}: offset {offset:#x}"
        super().__init__(f"{where}: {message}")


class ReplayError(TracedbgError):
    """The replay core refused an event; `event` is its index."""

    def __init__(self, message: str, event: int | None = None) -> None:
        self.event = event
        super().__init__(message if event is None else f"event {event}: {message}")
