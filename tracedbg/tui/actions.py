"""What the user can do, read off the bindings: for the help, the palette and the names in the configuration."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from textual.app import App
from textual.binding import Binding, BindingsMap
from textual.dom import DOMNode
from textual.keys import key_to_character
from textual.screen import Screen
from textual.widget import Widget

_ACTION = re.compile(r"(?:[a-z]+\.)?(?P<name>\w+)(?:\((?P<arguments>.*)\))?")
_MOVES = ("move", "page", "edge", "scroll", "choose", "app.")
_SPECIAL = {
    "slash": "/", "up": "↑", "down": "↓", "left": "←", "right": "→", "pageup": "PgUp", "pagedown": "PgDn", "escape": "Esc",
}  # fmt: skip


_FOREIGN = {(b.key, b.action) for b in Binding.make_bindings(App.BINDINGS)}  # Textual's own, of which nobody needs to know


@dataclass(frozen=True)
class Action:
    """Something that can be done on a node, and the keys that do it."""

    node: DOMNode
    action: str
    text: str
    keys: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, str]:
        """The name of the action and its arguments."""
        return _parsed(self.action)


def _parsed(action: str) -> tuple[str, str]:
    match = _ACTION.fullmatch(action)
    return (match["name"], match["arguments"] or "") if match is not None else (action, "")


def binding_id(binding: Binding) -> str:
    """The name of a binding in a configuration: its own, or one made from its action."""
    if binding.id is not None:
        return binding.id
    name, arguments = _parsed(binding.action)
    if arguments in ("", "1"):
        return name
    return f"{name}_back" if arguments == "-1" else f"{name}_{re.sub(r'[^a-z0-9]+', '_', arguments.lower()).strip('_')}"


def key_label(key: str) -> str:
    """A key as people write it."""
    *held, last = key.split("+")
    name = _SPECIAL.get(last)
    if name is None:
        char = key_to_character(last)
        name = char if char is not None and char.isprintable() and char != " " else last.capitalize()
    if held:
        name = name.upper() if len(name) == 1 else name
    return "-".join((*(part.capitalize() for part in held), name))


def actions_of(node: DOMNode, bindings: Iterable[Binding] | None = None) -> list[Action]:
    """All that a node offers, in the order of its bindings; `bindings`: only these. Without a description it is no offer."""
    found: dict[str, Action] = {}
    wanted = {b.action for b in (declared(type(node)) if bindings is None else bindings)}
    for key, binding in node._bindings:
        if not binding.description or binding.action not in wanted or (key, binding.action) in _FOREIGN:
            continue
        text = binding.tooltip or binding.description
        known = found.get(binding.action)
        if known is None:
            found[binding.action] = Action(node, binding.action, text, (key_label(key),))
        elif key_label(key) not in known.keys:
            found[binding.action] = replace(known, keys=(*known.keys, key_label(key)))
    return list(found.values())


def offers(screen: Screen[object]) -> list[tuple[str, Action]]:
    """All that can be done on a screen, each with the pane that it belongs to; first what the focus is on."""
    app = screen.app
    result: list[tuple[str, Action]] = []
    seen: set[tuple[DOMNode, str]] = set()

    def add(title: str, actions: Iterable[Action]) -> None:
        for action in actions:
            if action.action.startswith("app.") and app in nodes:  # there for the footer of a pane
                continue
            what = (action.node, action.action)
            if what not in seen and app._check_action_state(action.action, action.node) is not False:
                seen.add(what)
                result.append((title, action))

    nodes = [node for node, _ in screen._modal_binding_chain]
    for node in nodes:
        add(pane_title(node), actions_of(node))
    if not screen.is_modal:
        for widget in screen.focus_chain:
            if widget is not screen.focused:  # of the others what they alone can do
                own = [b for b in own_bindings(type(widget)) if not b.action.startswith(_MOVES)]
                add(pane_title(widget), actions_of(widget, own))
    return result


def declared(kind: type[object]) -> list[Binding]:
    """The bindings of a class that are the viewer's and not the toolkit's."""
    return [b for k in kind.__mro__ if not k.__module__.startswith("textual.") for b in own_bindings(k)]


def own_bindings(kind: type[object]) -> list[Binding]:
    """Those that a class declares itself."""
    return list(Binding.make_bindings(kind.__dict__.get("BINDINGS", ())))


def pane_title(node: DOMNode) -> str:
    """The name of a pane; empty for what is none."""
    if not isinstance(node, Widget) or isinstance(node, Screen):
        return ""
    return str(getattr(type(node), "BORDER_TITLE", "") or (node.id or "").capitalize())


def merged(actions: Iterable[Action], texts: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Rows of keys and text; an action that goes both ways has one row. `texts`: better ones by name of the action."""
    texts = texts or {}
    rows: list[tuple[str, str]] = []
    rest = list(actions)
    while rest:
        first = rest.pop(0)
        name, arguments = first.arguments
        other = next((a for a in rest if arguments in ("1", "-1") and a.arguments == (name, str(-int(arguments)))), None)
        if other is None:
            rows.append((" ".join(first.keys), texts.get(name, first.text)))
            continue
        rest.remove(other)
        if arguments == "-1":
            first, other = other, first
        if len(first.keys) == len(other.keys):
            keys = "  ".join(f"{a} {b}" for a, b in zip(first.keys, other.keys, strict=True))
        else:
            keys = f"{' '.join(first.keys)}  {' '.join(other.keys)}"
        rows.append((keys, texts.get(name) or either(first.text, other.text)))
    return rows


def either(one: str, other: str) -> str:
    """Two texts as one: `next / previous finding`."""
    a, b = one.split(), other.split()
    if a == b:
        return one
    tail: list[str] = []
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        tail.insert(0, a.pop())
        b.pop()
    return " ".join((*a, "/", *b, *tail))


def remap(bindings: BindingsMap, keys: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Give actions other keys, which are theirs alone then; returns the ids that were there."""
    moved: dict[str, Binding] = {}
    for key, held in list(bindings.key_to_bindings.items()):
        left = []
        for binding in held:
            name = binding_id(binding)
            if name in keys:
                moved.setdefault(name, binding)
            else:
                left.append(binding)
        if left:
            bindings.key_to_bindings[key] = left
        else:
            del bindings.key_to_bindings[key]
    new: dict[str, list[Binding]] = {}
    for name, binding in moved.items():
        for key in keys[name]:
            new.setdefault(key, []).append(binding.with_key(key))
    bindings.key_to_bindings.update(new)
    return set(moved)
