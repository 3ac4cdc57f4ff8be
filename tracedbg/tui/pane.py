"""What panes are painted with: styles worked out once, and scroll bars that are painted only when they look different."""

from __future__ import annotations

from typing import Any

from rich.style import Style
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.scrollbar import ScrollBar
from textual.widget import Widget


class Painted(Widget):
    """A widget that paints lines. Textual forgets styles at every refresh, and making one goes through all ancestors."""

    def __init__(self, **kwargs: Any) -> None:
        self._base: Style | None = None
        self._parts: dict[str, Style] = {}
        super().__init__(**kwargs)

    @property
    def base(self) -> Style:
        """The style of the widget itself."""
        if self._base is None:
            self._base = self.rich_style
        return self._base

    def part(self, name: str) -> Style:
        """A component style to be added to the base style of a line."""
        style = self._parts.get(name)
        if style is None:
            style = self._parts[name] = self.get_component_rich_style(name, partial=True)
        return style

    def notify_style_update(self) -> None:
        self._base = None
        self._parts.clear()
        super().notify_style_update()


class ThumbBar(ScrollBar):
    """A scroll bar of which a long list moves the thumb too little to be seen, mostly."""

    _looks: object = None

    def _look(self) -> object:
        size, window, virtual = self.size.height, self.window_size, self.window_virtual_size
        if not size or not 0 < window < virtual:
            return (size, self.mouse_over, bool(self.grabbed))
        thumb = max(1.0, window * size / virtual)
        start = int((size - thumb) * self.position / (virtual - window) * 8)  # eighths of a cell, as it is painted
        return (size, start, -int(-thumb * 8), self.mouse_over, bool(self.grabbed))

    def refresh(self, *regions: Any, repaint: bool = True, layout: bool = False, recompose: bool = False) -> Any:
        if repaint and not (regions or layout or recompose) and self._looks is not None and self._looks == self._look():
            return self
        return super().refresh(*regions, repaint=repaint, layout=layout, recompose=recompose)

    def notify_style_update(self) -> None:
        self._looks = None
        super().notify_style_update()

    def render(self) -> Any:
        self._looks = self._look()
        return super().render()


class Pane(Painted, ScrollView):
    """A scrolled pane that paints its lines itself."""

    @property
    def vertical_scrollbar(self) -> ScrollBar:
        """As Widget.vertical_scrollbar, which has no other way to choose the class."""
        bar = self._vertical_scrollbar
        if bar is None:
            bar = self._vertical_scrollbar = ThumbBar(vertical=True, name="vertical", thickness=self.scrollbar_size_vertical)
            bar.display = False
            self.app._start_widget(self, bar)
        return bar

    def set_height(self, lines: int) -> None:
        """Set the virtual size without a new layout of the screen, of which the always visible scroll bars have no need."""
        self.set_reactive(ScrollView.virtual_size, Size(1, lines))
        self.vertical_scrollbar.window_virtual_size = lines
        if self.scroll_target_y > self.max_scroll_y:
            self.scroll_to(y=self.max_scroll_y, animate=False, force=True)
