"""Drawings of lines, areas, words and pictures, written as SVG and PNG; curves and histograms made of them.

Two small writers of the same marks instead of a plotting library: the SVG stands in the report page as it is, where CSS
restyles it by class for dark screens, and nothing has to be installed. Lengths are in CSS pixels, y points down.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import atomic_path

COLOURS = {"ink": "#16191d", "muted": "#5c636b", "grid": "#dfe3e7", "accent": "#0a5fb4"}
FONT_SIZE = 11
PIL_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
DASH = (5, 4)  # drawn, left out
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 360, 270, 46, 350, 230  # of a plot, and where its axes are

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: Points
    colour: str
    width: float = 1.0
    dashed: bool = False

    def svg(self) -> str:
        """As a polyline; the class lets CSS override the colour."""
        dash = f' stroke-dasharray="{DASH[0]} {DASH[1]}"' if self.dashed else ""
        return (
            f'<polyline class="{self.colour}" fill="none" stroke="{COLOURS[self.colour]}" stroke-width="{self.width}" '
            f'stroke-linejoin="round"{dash} points="{_places(self.points)}"/>'
        )

    def paint(self, canvas: Image.Image, scale: int) -> None:
        """On a canvas of `scale` pixels a unit."""
        draw = ImageDraw.Draw(canvas)
        for piece in _dashes(self.points) if self.dashed else [self.points]:
            points = [(x * scale, y * scale) for x, y in piece]
            draw.line(points, COLOURS[self.colour], max(round(self.width * scale), 1), joint="curve")


@dataclass(frozen=True)
class Area:
    """A translucent polygon."""

    points: Points
    colour: str

    def svg(self) -> str:
        """As a polygon."""
        fill = f'fill="{COLOURS[self.colour]}" fill-opacity="0.25"'
        return f'<polygon class="{self.colour}" {fill} points="{_places(self.points)}"/>'

    def paint(self, canvas: Image.Image, scale: int) -> None:
        """On a canvas of `scale` pixels a unit."""
        points = [(x * scale, y * scale) for x, y in self.points]
        ImageDraw.Draw(canvas, "RGBA").polygon(points, fill=COLOURS[self.colour] + "40")


@dataclass(frozen=True)
class Text:
    """Words whose baseline begins, ends or has its middle (`anchor`) at (x, y)."""

    x: float
    y: float
    words: str
    colour: str = "ink"
    anchor: str = "start"

    def svg(self) -> str:
        """As text, so that it can be searched and edited."""
        return (
            f'<text class="{self.colour}" x="{self.x:.4g}" y="{self.y:.4g}" fill="{COLOURS[self.colour]}" '
            f'text-anchor="{self.anchor}">{escape(self.words)}</text>'
        )

    def paint(self, canvas: Image.Image, scale: int) -> None:
        """On a canvas of `scale` pixels a unit."""
        place, font = (self.x * scale, self.y * scale), _font(FONT_SIZE * scale)
        ImageDraw.Draw(canvas).text(place, self.words, COLOURS[self.colour], font, PIL_ANCHORS[self.anchor])


@dataclass(frozen=True)
class Picture:
    """A picture with its upper left corner at (x, y)."""

    x: float
    y: float
    width: float
    height: float
    image: Image.Image

    def svg(self) -> str:
        """As PNG in a data URI."""
        return (
            f'<image x="{self.x:.4g}" y="{self.y:.4g}" width="{self.width}" height="{self.height}" '
            f'preserveAspectRatio="none" href="data:image/png;base64,{encode(self.image, "PNG")}"/>'
        )

    def paint(self, canvas: Image.Image, scale: int) -> None:
        """On a canvas of `scale` pixels a unit."""
        size = (round(self.width * scale), round(self.height * scale))
        place = (round(self.x * scale), round(self.y * scale))
        canvas.paste(self.image.resize(size, Image.Resampling.BILINEAR), place)


@dataclass
class Drawing:
    """Marks on a white page; `title` is what a screen reader says of it."""

    title: str
    width: float
    height: float
    marks: list[Line | Area | Text | Picture] = field(default_factory=list)

    def svg(self) -> str:
        """An <svg> element."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(self.title)}" font-family="system-ui, Helvetica, Arial, sans-serif" '
            f'font-size="{FONT_SIZE}">{"".join(mark.svg() for mark in self.marks)}</svg>'
        )

    def png(self, scale: int = 3) -> Image.Image:
        """RGB pixels, `scale` a unit: 3 are 288 dots an inch. Drawn twice as large and reduced, for smooth lines."""
        canvas = Image.new("RGB", (round(self.width * scale * 2), round(self.height * scale * 2)), "white")
        for mark in self.marks:
            mark.paint(canvas, scale * 2)
        return canvas.reduce(2)

    def save(self, folder: Path, name: str, scale: int = 3) -> None:
        """Write NAME.svg and NAME.png."""
        with atomic_path(folder / f"{name}.svg", "--figures") as temporary:
            temporary.write_text(self.svg(), encoding="utf-8")
        with atomic_path(folder / f"{name}.png", "--figures") as temporary:
            self.png(scale).save(temporary, "PNG", dpi=(96 * scale, 96 * scale))


@dataclass(frozen=True)
class Series:
    """A curve; one with a name stands in the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "accent"
    dashed: bool = False
    filled: bool = False  # down to the x axis


def plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    marks: Sequence[tuple[float, str]] = (),
    x_step: float = 0.0,
) -> Drawing:
    """Curves on a grid, with a legend.

    Args:
        title: see `Drawing`.
        series: drawn in this order.
        x_label: what the axis shows.
        y_label: likewise; it stands above its axis, so that nothing has to be read sideways.
        x_range: from low to high; an empty one is widened.
        y_range: likewise.
        marks: (x, words) of vertical lines.
        x_step: the least distance of two ticks: 1 where x is counted.
    """
    drawing = Drawing(title, WIDTH, HEIGHT, [Text(8, 14, y_label, "muted")])
    top = _legend(drawing, [s for s in series if s.name]) + 14
    x_low, x_high = _widened(x_range)
    y_low, y_high = _widened(y_range)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (RIGHT - LEFT),
            BOTTOM - (y - y_low) / (y_high - y_low) * (BOTTOM - top),
        )

    for tick in ticks(y_low, y_high):
        (_, y) = place(x_low, tick)
        drawing.marks += [Line([(LEFT, y), (RIGHT, y)], "grid"), Text(LEFT - 6, y + 4, f"{tick:.10g}", "muted", "end")]
    for tick in ticks(x_low, x_high, x_step):
        (x, _) = place(tick, y_low)
        drawing.marks += [
            Line([(x, BOTTOM), (x, BOTTOM + 4)], "muted"),
            Text(x, BOTTOM + 17, f"{tick:.10g}", "muted", "middle"),
        ]
    drawing.marks += [
        Line([(LEFT, BOTTOM), (RIGHT, BOTTOM)], "muted"),
        Text((LEFT + RIGHT) / 2, HEIGHT - 6, x_label, "muted", "middle"),
    ]
    for x, words in marks:
        (at, _) = place(x, y_low)
        right = at > (LEFT + RIGHT) / 2
        drawing.marks += [
            Line([(at, top), (at, BOTTOM)], "muted", 1.0, dashed=True),
            Text(at - 5 if right else at + 5, top + 9, words, "muted", "end" if right else "start"),
        ]
    for s in series:
        points = [place(x, y) for x, y in zip(s.x, s.y, strict=True)]
        if s.filled:
            drawing.marks.append(Area([(points[0][0], BOTTOM), *points, (points[-1][0], BOTTOM)], s.colour))
        drawing.marks.append(Line(points, s.colour, 1.0 if s.colour == "grid" else 1.75, s.dashed))
    return drawing


def histogram(
    title: str,
    groups: Sequence[tuple[str, np.ndarray, str]],
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    bins: int = 40,
) -> Drawing:
    """Histograms of (name, values, colour) on common bins, in percent of each group."""
    shown = np.concatenate([*(values for _, values, _ in groups), [x for x, _ in marks]])
    edges = np.histogram_bin_edges(shown, bins)
    series = []
    for name, values, colour in groups:
        share = 100 * np.histogram(values, edges)[0] / max(len(values), 1)
        series.append(Series(name, np.repeat(edges, 2)[1:-1], np.repeat(share, 2), colour, filled=True))
    highest = max(float(s.y.max()) for s in series)
    return plot(title, series, x_label, "% of the class", (edges[0], edges[-1]), (0, highest * 1.1), marks)


def ticks(low: float, high: float, least: float = 0.0, most: int = 6) -> list[float]:
    """Round values from `low` to `high`, `least` or more apart, at most `most` of them."""
    rough = max((high - low) / (most - 1), least)
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9)
    return [round(float(n * step), 12) + 0.0 for n in np.arange(first, last + 1)]  # no -0


def encode(image: Image.Image, kind: str, **options: object) -> str:
    """The bytes of a picture file as base64, for a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def _legend(drawing: Drawing, series: Sequence[Series]) -> float:
    """Names beside samples of their lines, as many in a row as there is room for; the y where they end."""
    x, y = 8.0, 31.0
    for s in series:
        width = 38 + 5.8 * len(s.name)
        if x + width > WIDTH and x > 8:
            x, y = 8.0, y + 16
        drawing.marks.append(Line([(x, y - 4), (x + 18, y - 4)], s.colour, 1.75, s.dashed))
        drawing.marks.append(Text(x + 23, y, s.name))
        x += width
    return y


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    low, high = limits
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _places(points: Points) -> str:
    return " ".join(f"{x:.5g},{y:.5g}" for x, y in points)


def _dashes(points: Points) -> list[Points]:
    """The pieces of a dashed line."""
    path = np.asarray(points, dtype=float)
    length = np.append(0.0, np.hypot(*np.diff(path, axis=0).T).cumsum())
    pieces = []
    for start in np.arange(0, length[-1], sum(DASH)):
        end = min(start + DASH[0], length[-1])
        at = [start, *length[(length > start) & (length < end)], end]
        pieces.append([(float(np.interp(a, length, path[:, 0])), float(np.interp(a, length, path[:, 1]))) for a in at])
    return pieces


@cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
