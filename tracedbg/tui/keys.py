"""Names of keys, as people write them in a configuration or on a command line."""

from __future__ import annotations

import re

from textual.keys import _character_to_key

from tracedbg.errors import UsageError
from tracedbg.text import clean

_NAMES = {
    "enter": "enter", "return": "enter", "esc": "escape", "escape": "escape", "tab": "tab", "space": "space",
    "backspace": "backspace", "del": "delete", "delete": "delete", "ins": "insert", "insert": "insert", "up": "up",
    "down": "down", "left": "left", "right": "right", "home": "home", "end": "end", "pageup": "pageup", "pgup": "pageup",
    "pagedown": "pagedown", "pgdn": "pagedown", **{f"f{n}": f"f{n}" for n in range(1, 13)},
}  # fmt: skip
_MODIFIERS = {"ctrl": "ctrl", "c": "ctrl", "alt": "alt", "m": "alt", "shift": "shift", "s": "shift"}
_CHORD = re.compile(r"((?:[A-Za-z]+[-+])+)(.|[A-Za-z0-9]+)", re.DOTALL)


def key_of(text: str) -> str:
    """The key that is called `n`, `[`, `Enter`, `PgDn`, `F5`, `Ctrl-P`, `ctrl+p`. Raises UsageError."""
    if len(text) == 1 and text.isprintable() and text != " ":
        return _character_to_key(text)
    if text.lower() in _NAMES:
        return _NAMES[text.lower()]
    if match := _CHORD.fullmatch(text):
        held = [_MODIFIERS.get(name.lower(), "") for name in re.split("[-+]", match[1])[:-1]]
        last = match[2].lower()
        key = _NAMES.get(last) or (_character_to_key(last) if len(last) == 1 and last.isprintable() and last != " " else "")
        if all(held) and key:
            return "+".join((*held, key))
    raise UsageError(f"{clean(text, 30)!r} is no key")


def script_of(text: str) -> list[str]:
    """The keys of a script like `n n w : 1234 Enter`: single characters, names with a capital, else text to be typed."""
    keys: list[str] = []
    for word in text.split():
        if len(word) > 1 and (word[0].isupper() or _CHORD.fullmatch(word)):
            try:
                keys.append(key_of(word))
                continue
            except UsageError:
                if word[0].isupper() and _CHORD.fullmatch(word):
                    raise
        keys += [_character_to_key(char) for char in word]
    return keys
