"""The part of the viewer that makes it one's own: help, commands, colours, keys, and the configuration that keeps them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

from textual import on
from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.driver import Driver
from textual.screen import Screen

from tracedbg.errors import UsageError
from tracedbg.tui import config
from tracedbg.tui.actions import Action, binding_id, offers, remap
from tracedbg.tui.base import Viewer
from tracedbg.tui.config import Config
from tracedbg.tui.help import TEXTS
from tracedbg.tui.theme import NAMES, THEMES

# The order of the footer, by id: what a narrow terminal cuts off stands last.
FOOTER = (
    "next_finding", "previous_finding", "search_again", "search_again_back", "goto", "ask_search", "explain", "help", "quit",
    "next_pane",
)  # fmt: skip


class Home(Viewer):
    """Help, palette, themes, the user's keys."""

    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+p", "command_palette", "commands", show=False, priority=True, id="commands"),
        Binding("T", "theme", "theme", show=False, id="theme"),
        Binding("ctrl+z", "suspend_process", "suspend", show=False, priority=True, id="suspend"),
    ]

    config: Config = Config()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "NO_COLOR" in os.environ:
            kwargs.setdefault("ansi_color", True)  # else Textual makes greys of all colours: still colours
        super().__init__(*args, **kwargs)

    def on_mount(self) -> None:
        problems = [*self.config.problems, *self._take_keys()]
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self.call_after_refresh(self._say, f"{problems[0]}{more}")

        known = self._bindings.key_to_bindings
        ranks = {name: place for place, name in enumerate(FOOTER)}

        def rank(key: str) -> int:
            return min(ranks.get(binding_id(b), len(ranks)) for b in known[key])

        self._bindings.key_to_bindings = {key: known[key] for key in sorted(known, key=rank)}

    @on(Driver.SignalResume)
    def _back_from_the_shell(self) -> None:
        """The terminal has forgotten the screen, which Textual (8.2) does not take into account here."""
        for screen in self.screen_stack:
            screen.refresh(layout=True)
        self.refresh(layout=True)

    # -- colours -------------------------------------------------------------------------------------------------------

    def first_theme(self) -> str:
        name = self.config.theme
        if name is None:
            few = self.console.color_system in (None, "standard", "windows")
            name = "16" if self.no_color or (few and not self.is_headless) else "dark"
        return THEMES[name].name

    def action_theme(self) -> None:
        """The next theme, which is kept."""
        names = tuple(THEMES)
        name = names[(names.index(NAMES.get(self.theme, names[-1])) + 1) % len(names)]
        self.theme = THEMES[name].name
        self._say(f"theme {name}{self._kept('theme', name)}")

    def _kept(self, name: str, value: str) -> str:
        path = self.config.path
        if path is None:
            return ""
        try:
            config.keep(path, name, value)
        except UsageError as error:
            return f" (not kept: {error})"
        except OSError as error:
            return f" (not kept: {(error.strerror or str(error)).lower()})"
        return ""

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _take_keys(self) -> list[str]:
        """Give the actions of the viewer and its panes the keys of the configuration; returns what makes no sense."""
        wanted = self.config.keys
        if not wanted:
            return []
        mine = remap(self._bindings, wanted)
        taken = {key for name in mine for key in wanted[name]}
        known = set(mine)
        for pane in self.screen.query("*"):
            known |= remap(pane._bindings, wanted)
            own = {key for name in wanted if name not in mine for key in wanted[name]}
            for key in taken - own:  # what the user gave to the viewer no pane keeps
                pane._bindings.key_to_bindings.pop(key, None)
        self.refresh_bindings()
        return [f"keys: there is no action {name!r} (`tracedbg help config`)" for name in wanted if name not in known]

    # -- help and commands ---------------------------------------------------------------------------------------------

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Everything that a binding with a description does, also where its pane has not the focus."""
        for pane, action in offers(screen):
            if action.action == "command_palette":
                continue
            name, arguments = action.arguments
            more = "" if arguments or pane else TEXTS.get(name, "")
            title = f"{pane}: {action.text}" if pane else action.text
            yield SystemCommand(f"{title}  ({' '.join(action.keys)})", more, partial(self._run_offer, action))

    async def _run_offer(self, action: Action) -> None:
        if action.node is not self and getattr(action.node, "can_focus", False):
            self.set_focus(action.node)  # type: ignore[arg-type]
        await self.run_action(action.action, action.node)
