"""The glyphs of severities: they carry the meaning, colour only helps."""

from __future__ import annotations

GLYPHS = {"error": "✗", "warning": "!", "note": "·"}
