"""trace.dat of trace-cmd."""
