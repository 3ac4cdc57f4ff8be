"""Colours: the palette of Okabe and Ito, whose hues differ for colour-blind eyes too. Glyphs and words carry the meaning."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="tracedbg-dark",
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
LIGHT = Theme(  # the same hues, darkened until they are read on a light ground
    name="tracedbg-light",
    primary="#005A8D",
    secondary="#5A6470",
    accent="#7A3E66",  # yellow cannot be darkened and stay itself: the reddish purple
    warning="#8A5A00",
    error="#B03A00",
    success="#00664A",
    foreground="#1A1D21",
    background="#FAFAF7",
    surface="#F0F0EC",
    panel="#DDE2E8",
    dark=False,
)
SIXTEEN = Theme(  # the terminal's own colours, on its own ground
    name="tracedbg-16",
    ansi=True,
    primary="ansi_cyan",
    secondary="ansi_default",
    accent="ansi_yellow",
    warning="ansi_yellow",
    error="ansi_bright_red",
    success="ansi_green",
    foreground="ansi_default",
    background="ansi_default",
    surface="ansi_default",
    panel="ansi_default",
    boost="ansi_default",
    dark=True,
    variables={
        "ansi-background": "ansi_black",
        "ansi-foreground": "ansi_white",
        "block-cursor-foreground": "ansi_black",
        "block-cursor-background": "ansi_white",
        "input-cursor-background": "ansi_black",
        "input-cursor-foreground": "ansi_bright_white",
        "input-selection-background": "ansi_bright_blue",
        "input-selection-foreground": "ansi_black",
        "footer-key-foreground": "ansi_yellow",
    },
)
THEMES = {"dark": DARK, "light": LIGHT, "16": SIXTEEN}
NAMES = {theme.name: name for name, theme in THEMES.items()}
