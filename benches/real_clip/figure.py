"""The figure of docs/balancing.md: gain against bank size, fit, and coverage of the searched images."""

import html
import math

import numpy as np

from measures import spread_of
from situations import BANK_SIZES, COVERAGES, NEW_DEFAULT, OLD_DEFAULT, QUARTER_SCALE, STRONG, always, summarise
from rule import PROPOSAL, group

WIDTH, HEIGHT, TOP, BOTTOM = 330, 346, 34, 250
LEFT, RIGHT = 48, 318
LINES = {STRONG: "#0b6e4f", NEW_DEFAULT: "#5fb49c", QUARTER_SCALE: "#b5651d", OLD_DEFAULT: "#7a7a7a"}
GROUPS = {"in-domain": "#0b6e4f", "few texts": "#5fb49c", "searched": "#8e44ad", "mixed": "#e0a458", "foreign": "#c0392b"}


class Panel:
    """One chart with a vertical axis of gains."""

    def __init__(self, number, title, caption, low, high):
        self.number, self.low, self.high = number, low, high
        self.parts = [text(LEFT, 18, title, weight="bold")]
        self.parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 46, caption, anchor="middle"))
        for step in np.arange(math.ceil(low / 0.02 - 1e-9), high / 0.02 + 1e-9):
            y = self.y(0.02 * step)
            self.parts.append(line(LEFT, y, RIGHT, y, "#888" if step == 0 else "#e4e4e4"))
            self.parts.append(text(LEFT - 6, y + 4, f"{0.02 * step:+.2f}" if step else "0", anchor="end"))

    def y(self, gain):
        clamped = min(max(gain, self.low), self.high)
        return BOTTOM - (clamped - self.low) / (self.high - self.low) * (BOTTOM - TOP)

    def x(self, share):
        return LEFT + 10 + share * (RIGHT - LEFT - 20)

    def ticks(self, labels):
        for share, label in labels:
            for row, part in enumerate(label.split("\n")):
                self.parts.append(text(self.x(share), BOTTOM + 16 + 13 * row, part, anchor="middle"))

    def polyline(self, points, colour):
        path = " ".join(f"{self.x(share):.1f},{self.y(gain):.1f}" for share, gain in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        self.parts += [dot(self.x(share), self.y(gain), colour, 2.5) for share, gain in points]

    def svg(self):
        return f'<g transform="translate({self.number * WIDTH},0)">{"".join(self.parts)}</g>'


def text(x, y, words, anchor="start", weight="normal"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{html.escape(words)}</text>'


def line(x1, y1, x2, y2, colour, dash=""):
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashes}/>'


def dot(x, y, colour, radius):
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.8"/>'


def of(draws, situation):
    return [draw for draw in draws if draw.situation == situation]


def size_panel(draws, low, high):
    panel = Panel(0, "Gain of hit@1 by size of the bank", "texts of the searched domain", low, high)
    situations = [s for s in (*(f"{size} texts" for size in BANK_SIZES), "in-domain") if of(draws, s)]
    shares = np.linspace(0, 1, len(situations))
    panel.ticks(zip(shares, [situation.removesuffix(" texts").replace("in-domain", "half") for situation in situations]))
    for share, situation in zip(shares, situations):
        by_set = summarise(of(draws, situation), always(STRONG)).by_set.values()
        panel.parts.append(line(panel.x(share), panel.y(min(by_set)), panel.x(share), panel.y(max(by_set)), LINES[STRONG]))
    for balance, colour in LINES.items():
        panel.polyline([(x, summarise(of(draws, s), always(balance)).mean) for x, s in zip(shares, situations)], colour)
    return panel


def fit_panel(draws, low, high):
    panel = Panel(1, f"Gain of {STRONG} by fit", "fit of the bank (dashed: thresholds)", low, high)
    panel.ticks([(fit, f"{fit:g}") for fit in (0, 0.15, 0.5, 0.75, 1)])
    for threshold in (PROPOSAL.low_fit, PROPOSAL.high_fit):
        x = panel.x(threshold)
        panel.parts.append(line(x, TOP, x, BOTTOM, "#555", dash="4 3"))
    points = {}
    for draw in draws:
        if draw.fit == draw.fit:
            points.setdefault((group(draw.situation), draw.situation, draw.case), []).append((draw.fit, draw.gain(STRONG).mean()))
    for (kind, _, _), values in sorted(points.items(), key=lambda item: list(GROUPS).index(item[0][0]), reverse=True):
        fit, gain = np.mean(values, axis=0)
        panel.parts.append(dot(panel.x(max(fit, 0)), panel.y(gain), GROUPS[kind], 3))
    return panel


def coverage_panel(draws, low, high):
    panel = Panel(2, "Gain of hit@1 by coverage", "searched images described, and mean fit", low, high)
    shares = np.linspace(0, 1, len(COVERAGES))
    situations = [f"searched {coverage:.0%}" for coverage in COVERAGES]
    fits = [spread_of(draw.fit for draw in of(draws, situation))[1] for situation in situations]
    panel.ticks([(x, f"{coverage:.0%}\n{fit:.2f}") for x, coverage, fit in zip(shares, COVERAGES, fits)])
    for balance, colour in LINES.items():
        panel.polyline([(x, summarise(of(draws, s), always(balance)).mean) for x, s in zip(shares, situations)], colour)
    return panel


def legend(entries, x, y):
    parts = []
    for name, colour in entries:
        parts += [dot(x, y - 4, colour, 4), text(x + 9, y, name)]
        x += 26 + 6.3 * len(name)
    return "".join(parts)


def draw_figure(draws):
    """Returns the figure as SVG."""
    panels = [size_panel(draws, -0.04, 0.08), fit_panel(draws, -0.06, 0.1), coverage_panel(draws, -0.04, 0.08)]
    names = [(str(balance), colour) for balance, colour in LINES.items()]
    words = "Gain of hit@1 over plain CLIP on real CLIP embeddings, against bank size, fit and coverage"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * WIDTH} {HEIGHT}" role="img" aria-label="{words}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">\n'
        f'<rect width="{3 * WIDTH}" height="{HEIGHT}" fill="#fff"/>\n'
        + "\n".join(panel.svg() for panel in panels)
        + f"\n{legend(names, LEFT, HEIGHT - 26)}{legend(GROUPS.items(), LEFT, HEIGHT - 8)}\n</svg>\n"
    )
