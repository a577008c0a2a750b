"""Charts as inline SVG, which follow the page's colours and scale with the screen.

They tell their values on hover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fedmira.shown import html_text

__all__ = [
    "Series",
    "axis_ticks",
    "change_bars",
    "element",
    "legend",
    "line_chart",
    "nice_number",
    "percent_text",
]

Point = tuple[float, float]

MOST_HOVERED_POINTS = 100  # a longer series is a bare line: its points would touch
MOST_DOTS = 0.08  # a unit of width; more would be a thick line
FONT = 12
CHARACTER_WIDTH = 0.58  # of the font size; a fair mean for sans-serif digits and lower-case letters


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart.

    Attributes:
        name: for the legend and the hover text.
        points: (x, y) by rising x; all finite.
        colour: 1..8, a colour of the page's palette.
        dashed: draws the line dashed, so that it differs without colour too.
    """

    name: str
    points: Sequence[Point]
    colour: int = 1
    dashed: bool = False

    @property
    def style(self) -> str:
        """The CSS classes of the line."""
        return f"series-{self.colour} dashed" if self.dashed else f"series-{self.colour}"


def element(name: str, *content: Markup | str, **attributes: str | float) -> Markup:
    """An SVG or HTML element; everything that is not Markup is escaped.

    `class_` is class, `stroke_width` is stroke-width.

    Args:
        name: of the element, such as "rect".
        content: what stands inside, in this order.
        attributes: of the element.
    """
    pairs = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"),
            f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else _seen(str(value)),
        )
        for key, value in attributes.items()
    )
    inside = Markup("").join(map(_seen, content))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, inside)


def _seen(text: Markup | str) -> Markup | str:
    """A text without what cannot be seen; markup as it is."""
    return text if isinstance(text, Markup) else html_text(text)


def nice_number(value: float) -> str:
    """A value in at most four significant digits, as a reader would write it."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.4g}"


def percent_text(share: float, decimals: int = 0) -> str:
    """A signed percentage with a true minus sign, such as "+12 %"; zero has no sign.

    Args:
        share: 0.12 for 12 %.
        decimals: digits behind the point.
    """
    text = f"{100 * share:+.{decimals}f}"
    return (
        "0" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
    ) + "\N{NO-BREAK SPACE}%"


def axis_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that enclose low..high with two to `most` + 2 ticks.

    They are evenly spaced by 1, 2 or 5 times a power of ten.

    Args:
        low: the smallest value, finite.
        high: the greatest value, finite; where it equals `low`, there is a tick on either side.
        most: about how many steps there may be.
    """
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(
        factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough * (1 - 1e-9)
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [
        round(index * step, 12 - math.floor(math.log10(step))) for index in range(first, last + 1)
    ]


def legend(series: Sequence[Series]) -> Markup:
    """The lines' names beside a sample of each."""
    keys = [
        element(
            "li",
            element(
                "svg",
                element("path", d="M1 6H25", class_=f"line {line.style}"),
                viewBox="0 0 26 12",
                aria_hidden="true",
            ),
            line.name,
        )
        for line in series
    ]
    return element("ul", *keys, class_="legend")


def line_chart(
    series: Sequence[Series],
    label: str,
    *,
    y_bounds: tuple[float, float] | None = None,
    x_bounds: tuple[float, float] | None = None,
    size: tuple[int, int] = (400, 240),
    font: int = FONT,
    x_title: str = "round",
) -> Markup:
    """Lines over rounds.

    Args:
        series: the lines; empty ones are left out.
        label: what the chart shows, for screen readers.
        y_bounds: lowest and highest value, for charts that share an axis; taken from the points
            where None.
        x_bounds: first and last round, likewise.
        size: width and height of the drawing, in the units of `font`.
        font: the font size.
        x_title: below the x axis, at its end; empty for none.

    Returns:
        An <svg>, or nothing where no line has a point.
    """
    lines = [line for line in series if line.points]
    if not lines:
        return Markup("")
    xs = x_bounds or _bounds([x for line in lines for x, _ in line.points])
    ys = y_bounds or _bounds([y for line in lines for _, y in line.points])
    width, height = size
    y_ticks = axis_ticks(*ys, most=4 if height > 150 else 3)
    left = 8 + font * CHARACTER_WIDTH * max(len(nice_number(tick)) for tick in y_ticks)
    frame = _Frame(
        left,
        8,
        width - 10,
        height - (2.4 if x_title else 1.5) * font,
        (xs[0], max(xs[1], xs[0] + 1)),
        (y_ticks[0], y_ticks[-1]),
    )
    x_ticks = _whole_ticks(*frame.x_range, most=8 if width > 300 else 3)
    parts = [element("g", *_grid(frame, x_ticks, y_ticks, font), class_="axis", font_size=font)]
    if x_title:
        parts.append(
            element(
                "text",
                x_title,
                x=frame.right,
                y=float(height - 3),
                text_anchor="end",
                font_size=font,
            )
        )
    for line in lines:
        parts.append(_line(frame, line, dotted=len(line.points) <= MOST_DOTS * width))
    return element(
        "svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_="chart"
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """The plotting area in drawing units, and the data range it shows."""

    left: float
    top: float
    right: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _whole_ticks(low: float, high: float, most: int) -> list[float]:
    """Ticks within low..high at whole numbers: there is no round 2.5."""
    return [
        tick for tick in axis_ticks(low, high, most) if low <= tick <= high and tick == int(tick)
    ]


def _grid(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], font: int
) -> list[Markup]:
    marks = []
    for tick in y_ticks:
        y = frame.y(tick)
        marks.append(
            element("path", d=f"M{frame.left:.1f} {y:.1f}H{frame.right:.1f}", class_="grid")
        )
        marks.append(
            element(
                "text", nice_number(tick), x=frame.left - 5, y=y + font * 0.35, text_anchor="end"
            )
        )
    for tick in x_ticks:
        marks.append(
            element(
                "text",
                nice_number(tick),
                x=frame.x(tick),
                y=frame.bottom + font * 1.2,
                text_anchor="middle",
            )
        )
    return marks


def _line(frame: _Frame, line: Series, dotted: bool) -> Markup:
    places = [(frame.x(x), frame.y(y), x, y) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _, _ in places)
    parts = [element("path", d=path, class_=f"line {line.style}")]
    for x, y, round_number, value in places:
        if dotted:
            parts.append(element("circle", cx=x, cy=y, r=2.2, class_="dot"))
        if len(places) <= MOST_HOVERED_POINTS:
            title = element(
                "title", f"{line.name}, round {nice_number(round_number)}: {nice_number(value)}"
            )
            parts.append(element("circle", title, cx=x, cy=y, r=7.0, class_="hover"))
    return element("g", *parts, class_=line.style)


def change_bars(
    changes: Sequence[tuple[str, float]],
    label: str,
    *,
    limit: float,
    size: tuple[int, int] = (400, 240),
) -> Markup:
    """A bar per client for a relative change, in the given order: down is a gain, up is harm.

    Args:
        changes: (client, change); 0.1 is ten percent more.
        label: what the chart shows, for screen readers.
        limit: changes smaller than this are drawn as unchanged.
        size: width and height of the drawing.
    """
    if not changes:
        return Markup("")
    width, height = size
    values = [100 * change for _, change in changes]
    ticks = axis_ticks(min(0.0, *values), max(0.0, *values), most=4)
    left = 14 + FONT * CHARACTER_WIDTH * max(len(percent_text(tick / 100)) for tick in ticks)
    frame = _Frame(left, 8, width - 10, height - 10, (0, len(values)), (ticks[0], ticks[-1]))
    marks = []
    for tick in ticks:
        y = frame.y(tick)
        marks.append(
            element(
                "path",
                d=f"M{frame.left:.1f} {y:.1f}H{frame.right:.1f}",
                class_="grid zero" if tick == 0 else "grid",
            )
        )
        marks.append(
            element(
                "text",
                percent_text(tick / 100),
                x=frame.left - 5,
                y=y + FONT * 0.35,
                text_anchor="end",
            )
        )
    bars = []
    gap = 0.15 if len(values) < 100 else 0.0
    for position, ((client, change), percent) in enumerate(zip(changes, values, strict=True)):
        kind = "harmed" if change > limit else "gained" if change < -limit else "unchanged"
        low, high = sorted((frame.y(0), frame.y(percent)))
        box_x, box_width = (
            frame.x(position + gap),
            frame.x(position + 1 - gap) - frame.x(position + gap),
        )
        title = element("title", f"{client}: {percent_text(change, 1)}")
        bars.append(
            element(
                "rect",
                title,
                x=box_x,
                y=low,
                width=box_width,
                height=max(high - low, 1.0),
                class_=f"bar {kind}",
            )
        )
    axis = element("g", *marks, class_="axis", font_size=FONT)
    return element(
        "svg",
        axis,
        *bars,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=label,
        class_="chart",
    )
