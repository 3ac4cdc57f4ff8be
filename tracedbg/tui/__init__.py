"""The interactive viewer. Importing this package does not import Textual; importing `tracedbg.tui.app` does."""
