"""Line charts as plain SVG text whose colours come from the page's style sheet.

Drawn here rather than by a plotting library so that one chart follows the reader's light or dark
mode, its marks can be links that work from the keyboard, and the page stays small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

LETTER_WIDTH = 7.5
"""At least as wide as an average letter of a label, in pixels."""


@dataclass(frozen=True)
class Scale:
    """Maps data to the unit interval.

    Args:
        low: Data value at 0.
        high: Data value at 1.
        log: Whether equal ratios take equal lengths; needs ``low > 0``.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a scale needs low < high, both finite (got {self.low}, {self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale needs low > 0 (got {self.low})")

    def __call__(self, value: float) -> float:
        """Position of ``value``, 0 at ``low`` and 1 at ``high``; held inside [-1, 2]."""
        if self.log:
            # Values at or below zero lie infinitely far down.
            position = (
                math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else -1.0
            )
        else:
            position = (value - self.low) / (self.high - self.low)
        return min(max(position, -1.0), 2.0)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the scale, at most about ``most`` of them."""
        return self._log_ticks(most) if self.log else self._linear_ticks(most)

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for mantissas in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
            values = [m * 10.0**d for d in decades for m in mantissas]
            inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
            if len(inside) <= most:
                # Less than a decade may hold hardly any of these.
                return inside if len(inside) > 2 else self._linear_ticks(most)
        step = math.ceil(len(inside) / most)
        return inside[::step]

    def _linear_ticks(self, most: int) -> list[float]:
        span = self.high - self.low
        magnitude = 10.0 ** math.floor(math.log10(span / most))
        step = next(m * magnitude for m in (1, 2, 2.5, 5, 10, 20) if span / (m * magnitude) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def nice_range(
    values: Sequence[float], *, log: bool = False, margin: float = 0.06, zero: bool = False
) -> Scale:
    """A scale around ``values`` with some air; non-finite values are left out.

    Args:
        values: Data, at least one finite (and positive, where ``log``).
        log: Logarithmic scale.
        margin: Air at each end, as a fraction of the span.
        zero: Whether a linear scale starts at 0.
    """
    usable = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not usable:
        return Scale(1.0, 10.0, log) if log else Scale(0.0, 1.0)
    low, high = min(usable), max(usable)
    if log:
        air = max((high / low) ** margin, 1.05)
        return Scale(low / air, high * air, log=True)
    air = margin * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(0.0 if zero else low - air, high + air)


def number(value: float, digits: int = 3) -> str:
    """A number as a reader wants it: ``digits`` significant ones, no exponent where short."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        text = f"{value:.{max(digits - 1 - exponent, 0)}f}"
        return text if len(text.split(".")[0].lstrip("-")) <= 4 else f"{float(text):,.0f}"
    mantissa = f"{value / 10.0**exponent:.{digits - 1}f}".rstrip("0").rstrip(".")
    return f"{mantissa}·10{superscript(exponent)}"


def plus_minus(value: float, error: float) -> str:
    """A number with its standard error, rounded where the error makes digits meaningless.

    The error keeps two digits if it begins with 1 or 2, else one: 0.140 ± 0.012, 0.14 ± 0.05.
    """
    if not math.isfinite(error) or error <= 0:
        return number(value)
    exponent = math.floor(math.log10(error))
    decimals = max(0, -exponent + (1 if error < 2.95 * 10.0**exponent else 0))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def tick_label(value: float) -> str:
    """A round number in its shortest form: 0.05, 2k, 10⁻⁴."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    if exponent < -3 or exponent > 5:
        mantissa = value / 10.0**exponent
        lead = "" if abs(mantissa - 1) < 1e-6 else f"{mantissa:.3g}·"
        return f"{lead}10{superscript(exponent)}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def subscripts(text: str) -> str:
    """SVG for text in which σ_rel is set with its subscript lowered."""
    return text.replace(
        "σ_rel", 'σ<tspan dy="3" font-size="80%">rel</tspan><tspan dy="-3">\u200b</tspan>'
    )


def superscript(exponent: int) -> str:
    """An integer in raised digits."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


class Chart:
    """One set of axes; methods add marks, :meth:`svg` gives the text.

    Marks are styled by class names: the style sheet decides on colours.

    Args:
        x: Horizontal scale.
        y: Vertical scale.
        width: Of the whole drawing, in pixels.
        height: Of the whole drawing, in pixels.
        left: Room for the vertical axis' labels.
        right: Room for labels at the ends of lines.
        top: Room above the axes.
        bottom: Room for the horizontal axis' labels.
    """

    def __init__(
        self,
        x: Scale,
        y: Scale,
        *,
        width: int,
        height: int,
        left: int = 52,
        right: int = 16,
        top: int = 26,
        bottom: int = 44,
    ) -> None:
        self.x, self.y = x, y
        self.width, self.height = width, height
        self.left, self.right = left, width - right
        self.top, self.bottom = top, height - bottom
        self._parts: list[str] = []

    def at_x(self, value: float) -> float:
        """Pixel of a horizontal data value."""
        return round(self.left + self.x(value) * (self.right - self.left), 2)

    def at_y(self, value: float) -> float:
        """Pixel of a vertical data value."""
        return round(self.bottom - self.y(value) * (self.bottom - self.top), 2)

    def axes(
        self,
        x_label: str,
        y_label: str,
        *,
        x_ticks: Sequence[float] | None = None,
        y_ticks: Sequence[float] | None = None,
        format_x: Callable[[float], str] = tick_label,
        format_y: Callable[[float], str] = tick_label,
    ) -> None:
        """Draw grid lines, tick labels and axis titles.

        Args:
            x_label: Title below the horizontal axis.
            y_label: Title above the vertical one (upright text reads faster than turned text).
            x_ticks: Where to put ticks; chosen from the scale where left out.
            y_ticks: Likewise.
            format_x: Tick value to text.
            format_y: Likewise.
        """
        columns = max(int((self.right - self.left) / 64), 3)
        rows = max(int((self.bottom - self.top) / 36), 3)
        for value in self.y.ticks(rows) if y_ticks is None else y_ticks:
            y = self.at_y(value)
            self._line(self.left, y, self.right, y, "grid")
            self.text(self.left - 8, y + 4, format_y(value), "tick", anchor="end")
        for value in self.x.ticks(columns) if x_ticks is None else x_ticks:
            x = self.at_x(value)
            self._line(x, self.bottom, x, self.bottom + 5, "axis")
            self.text(x, self.bottom + 19, format_x(value), "tick", anchor="middle")
        self._line(self.left, self.bottom, self.right, self.bottom, "axis")
        middle = (self.left + self.right) / 2
        self.text(middle, self.height - 5, x_label, "label", anchor="middle")
        self.text(4, self.top - 12, y_label, "label")

    def spaced(self, ticks: Sequence[float], distance: float = 15.0) -> list[float]:
        """Those vertical ticks that lie in the axes and not too close to earlier ones.

        Args:
            ticks: Data values, the most wanted first.
            distance: Least distance in pixels.
        """
        kept: list[float] = []
        for tick in ticks:
            if self.y.low <= tick <= self.y.high and all(
                abs(self.at_y(tick) - self.at_y(other)) >= distance for other in kept
            ):
                kept.append(tick)
        return sorted(kept)

    def line(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """Join points; a non-finite one breaks the line."""
        path, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                path.append(f"{pen}{self.at_x(x):g} {self.at_y(y):g}")
                pen = "L"
            else:
                pen = "M"
        self._parts.append(f'<path class="line {style}" d="{"".join(path)}"/>')

    def area(self, xs: Sequence[float], ys: Sequence[float], style: str) -> None:
        """Fill between points and the horizontal axis."""
        outline = "L".join(
            f"{self.at_x(x):g} {self.at_y(y):g}" for x, y in zip(xs, ys, strict=True)
        )
        first, last = self.at_x(xs[0]), self.at_x(xs[-1])
        self._parts.append(
            f'<path class="area {style}" d="M{first:g} {self.bottom}L{outline}'
            f'L{last:g} {self.bottom}Z"/>'
        )

    def band(self, low: float, high: float, style: str) -> None:
        """Shade a horizontal strip across the axes."""
        top, bottom = self.at_y(high), self.at_y(low)
        self._parts.append(
            f'<rect class="band {style}" x="{self.left}" y="{top:g}" '
            f'width="{self.right - self.left}" height="{max(bottom - top, 0.5):g}"/>'
        )

    def level(self, y: float, style: str) -> None:
        """A horizontal line across the axes."""
        self._line(self.left, self.at_y(y), self.right, self.at_y(y), f"line {style}")

    def name_level(
        self, y: float, text: str, style: str, marks: Sequence[tuple[float, float, float]]
    ) -> None:
        """Write the name of a horizontal line beside it, where marks leave most room.

        Args:
            y: Where the line is.
            text: Its name.
            style: Classes of the text.
            marks: What is joined to a curve: x, and from where to where it reaches in y.
        """
        at = [(self.at_x(x), self.at_y(high), self.at_y(low)) for x, low, high in marks]
        steps = [k / 4 for k in range(4)]
        at += [
            (a[0] + k * (b[0] - a[0]), a[1] + k * (b[1] - a[1]), a[2] + k * (b[2] - a[2]))
            for a, b in pairwise(at)
            for k in steps
        ]
        width, level = LETTER_WIDTH * len(text), self.at_y(y)
        places = [
            (left, baseline)
            for baseline in (level - 6, level + 15)
            for left in (self.left + 6, self.right - 6 - width)
        ]

        def hidden(place: tuple[float, float]) -> int:
            left, baseline = place
            return sum(
                left - 4 <= x <= left + width + 4
                and top <= baseline + 4
                and bottom >= baseline - 13
                for x, top, bottom in at
            )

        left, baseline = min(places, key=hidden)
        self.text(left, baseline, text, style)

    def whisker(self, x: float, low: float, high: float, style: str) -> None:
        """A vertical error bar with caps."""
        x, top, bottom = self.at_x(x), self.at_y(high), self.at_y(low)
        self._parts.append(
            f'<path class="line {style}" d="M{x} {top}V{bottom}'
            f'M{x - 3.5} {top}h7M{x - 3.5} {bottom}h7"/>'
        )

    def stem(self, x: float, y: float, style: str, shift: float = 0.0) -> None:
        """A vertical line from zero to ``y`` with a dot at its end, moved ``shift`` pixels."""
        x, zero, end = self.at_x(x) + shift, self.at_y(0.0), self.at_y(y)
        self._parts.append(f'<path class="line {style}" d="M{x:g} {zero:g}V{end:g}"/>')
        self._parts.append(f'<circle class="dot {style}" cx="{x:g}" cy="{end:g}" r="2.2"/>')

    def tick_mark(self, x: float, style: str, length: float = 9.0) -> None:
        """A short mark standing on the horizontal axis."""
        self._line(self.at_x(x), self.bottom, self.at_x(x), self.bottom - length, style)

    def dot(self, x: float, y: float, style: str, radius: float = 4.0) -> None:
        """A round point."""
        place = f'cx="{self.at_x(x):g}" cy="{self.at_y(y):g}"'
        self._parts.append(f'<circle class="dot {style}" {place} r="{radius:g}"/>')

    def diamond(self, x: float, y: float, style: str) -> None:
        """A point standing on its corner: series differ in shape, not in colour alone."""
        place = f"M{self.at_x(x):g} {self.at_y(y) - 5.5:g}"
        self._parts.append(f'<path class="dot {style}" d="{place}l5.5 5.5l-5.5 5.5l-5.5 -5.5Z"/>')

    def triangle(self, x: float, y: float, style: str) -> None:
        """A point with three corners."""
        place = f"M{self.at_x(x):g} {self.at_y(y) - 5:g}"
        self._parts.append(f'<path class="dot {style}" d="{place}l5 8.7h-10Z"/>')

    def add(self, markup: str) -> None:
        """Any other SVG, in pixels (see :meth:`at_x`)."""
        self._parts.append(markup)

    def link(self, x: float, y: float, href: str, title: str, style: str) -> None:
        """A point that is a link, with a target large enough for a finger."""
        at_x, at_y = self.at_x(x), self.at_y(y)
        self._parts.append(
            f'<a href="{escape(href)}" class="point {style}" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>"
            f'<circle class="target" cx="{at_x:g}" cy="{at_y:g}" r="14"/>'
            f'<circle class="dot" cx="{at_x:g}" cy="{at_y:g}" r="4.5"/></a>'
        )

    def text(self, x: float, y: float, text: str, style: str, *, anchor: str = "start") -> None:
        """Text at a pixel position."""
        place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
        self._parts.append(f'<text class="{style}" {place}>{subscripts(escape(text))}</text>')

    def group(self, index: int) -> None:
        """Start a group that the page shows only while state ``index`` is selected."""
        self._parts.append(f'<g class="state" data-state="{index}">')

    def end_group(self) -> None:
        """Close the group."""
        self._parts.append("</g>")

    def svg(self, description: str) -> str:
        """The drawing, with a description for those who cannot see it."""
        marks = "".join(self._parts)
        role = "group" if "<a " in marks else "img"  # links inside an image could not be reached
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="{role}" aria-label="{escape(description)}">{marks}</svg>'
        )

    def _line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self._parts.append(
            f'<line class="{style}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'
        )


def responsive(
    draw: Callable[[int, int], str], wide: tuple[int, int], narrow: tuple[int, int]
) -> str:
    """Draw twice, for wide and narrow windows; scaling one drawing makes its text too small.

    Args:
        draw: ``(width, height)`` to SVG text.
        wide: Size in pixels for windows above the style sheet's limit.
        narrow: Size for those below.
    """
    return (
        f'<div class="chart wide">{draw(*wide)}</div>'
        f'<div class="chart narrow">{draw(*narrow)}</div>'
    )
