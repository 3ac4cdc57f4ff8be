"""Intel PT with Event Trace."""
