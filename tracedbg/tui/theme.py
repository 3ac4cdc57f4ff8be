"""Colours: the palette of Okabe and Ito, whose hues differ for colour-blind eyes too."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="tracedbg",
    primary="#56B4E9",
    secondary="#98A4B0",
    accent="#F0E442",
    warning="#E69F00",
    error="#FF7A33",  # vermilion, lightened for text on a dark ground
    success="#009E73",
    foreground="#E6E6E6",
    background="#12161C",
    surface="#1B212A",
    panel="#262E3A",
    dark=True,
)
