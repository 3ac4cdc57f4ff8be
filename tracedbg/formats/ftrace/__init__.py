"""The text of Linux's tracepoints."""
