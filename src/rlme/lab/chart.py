"""Line charts with bands as SVG text: small enough to commit, readable in light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3b6fd4", "#d9662b", "#2f9e5b", "#b0459c", "#b8972a", "#23969e", "#8a6fd1")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 400, 230, 44, 26, 34


@dataclass(frozen=True)
class Line:
    """A curve: x, y, and (where there are several runs) lowest and highest y."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    dots: bool = False
    """Points that no line joins."""


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    y_range: tuple[float, float] | None = (0.0, 1.0)
    x_range: tuple[float, float] | None = None


def chart(panels: Sequence[Panel]) -> str:
    """Panels in rows of two or three, a legend under each."""
    across = 2 if len(panels) == 4 else min(len(panels), 3)
    tall = HEIGHT + 16 * max((len(p.lines) + 1) // 2 for p in panels) + 8
    width, height = WIDTH * across, tall * -(-len(panels) // across)
    places = [(i % across * WIDTH, i // across * tall) for i in range(len(panels))]
    drawn = "".join(
        f'<g transform="translate({x},{y})">{_panel(p)}</g>' for (x, y), p in zip(places, panels, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="{width}" height="{height}" fill="#ffffff"/>'
        f"{drawn}</svg>\n"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about five of them."""
    rough = (high - low) / 4
    size: float = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * (1 - 1e-9))
    return [step * n for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _panel(panel: Panel) -> str:
    xs = [x for line in panel.lines for x in line.x] or [0.0, 1.0]
    ys = [y for line in panel.lines for part in (line.y, line.low or (), line.high or ()) for y in part] or [0.0, 1.0]
    x0, x1 = panel.x_range or (min(0.0, *xs), max(xs))
    y0, y1 = panel.y_range or (min(ys), max(ys))
    if y1 <= y0:
        y0, y1 = y0 - 0.5, y1 + 0.5
    heights = _ticks(y0, y1)
    y0, y1 = heights[0], heights[-1]
    right, bottom = WIDTH - 14, HEIGHT - BOTTOM

    def at(x: float, y: float) -> str:
        across = LEFT + (right - LEFT) * (x - x0) / ((x1 - x0) or 1)
        up = bottom - (bottom - TOP) * (min(max(y, y0), y1) - y0) / (y1 - y0)
        return f"{across:.1f},{up:.1f}"

    parts = [f'<text x="{LEFT}" y="15" font-weight="bold" fill="#222">{escape(panel.title)}</text>']
    for y in heights:
        _, up = at(x0, y).split(",")
        parts.append(f'<path d="M{LEFT} {up}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{float(up) + 4:.1f}" text-anchor="end" fill="#555">{y:.4g}</text>')
    for x in (x for x in _ticks(x0, x1 if x1 > x0 else x0 + 1) if x0 <= x <= x1):
        across, _ = at(x, y0).split(",")
        parts.append(f'<text x="{across}" y="{bottom + 15}" text-anchor="middle" fill="#555">{x:.4g}</text>')
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{bottom + 29}" text-anchor="middle" fill="#555">{panel.x_label}</text>'
    )
    for i, line in enumerate(panel.lines):
        colour = COLOURS[line.colour % len(COLOURS)]
        if line.low and line.high:
            edge = [at(x, y) for x, y in zip(line.x, line.high, strict=True)]
            edge += [at(x, y) for x, y in reversed(list(zip(line.x, line.low, strict=True)))]
            parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.18"/>')
        points = [at(x, y) for x, y in zip(line.x, line.y, strict=True)]
        if line.dots:
            centres = (point.split(",") for point in points)
            parts += [f'<circle cx="{across}" cy="{up}" r="3.5" fill="{colour}"/>' for across, up in centres]
        else:
            parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        x, y = LEFT + (i % 2) * 170, HEIGHT + 8 + 16 * (i // 2)
        parts.append(f'<path d="M{x} {y - 4}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 24}" y="{y}" fill="#222">{escape(line.label)}</text>')
    return "".join(parts)
