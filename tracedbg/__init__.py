"""tracedbg: what nested interrupts do to x86-64 stacks."""

__version__ = "0.1.0"
