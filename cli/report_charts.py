"""The charts of the capacity report: SVG by matplotlib, to stand inside a page.

Inline SVG needs no script and no network, prints sharply, and takes its colours from the page: matplotlib draws in
marker colours, which become CSS variables here, so that one file is light and dark. (plotly's script alone has 4 MB.)
"""

import io
import re
from collections.abc import Callable
from typing import Any

from ..planner.report import Report
from ..planner.whatif import Memory, Width

GIB = 1 << 30
INK, LINE, LIMIT = "#010203", "#010204", "#010205"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
VARIABLES = {INK: "--ink", LINE: "--line", LIMIT: "--limit"} | {
    color: f"--series-{place}" for place, color in enumerate(SERIES, 1)
}
SIZE_INCHES = (4.6, 3.0)
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.transparent": True,
}
Draw = Callable[[Any], None]


def charts(found: Report, memory: Memory, widths: tuple[Width, ...]) -> dict[str, str]:
    """SVG elements by name, each with the sentence that says what it shows."""
    targets, load = found.question.workload.targets, found.load
    factors = [point.factor for point in load]
    ttft, tpot = [point.p95_ttft_s for point in load], [point.p95_tpot_s for point in load]
    times, seqs = "times the load", [one.seqs for one in widths]
    return {
        "memory": _svg("memory", "Memory of one sequence over its context", lambda axes: _memory(axes, memory)),
        "throughput": _svg(
            "throughput", "Tokens per second of all sequences together", lambda axes: _throughput(axes, widths)
        ),
        "each": _svg(
            "each",
            "Tokens per second of each sequence",
            lambda axes: _line(axes, seqs, [one.each_tokens_per_s for one in widths], "sequences", "tokens/s"),
        ),
        "ttft": _svg(
            "ttft",
            "95th percentile of the time to first token",
            lambda axes: _line(axes, factors, ttft, times, "s", targets.p95_ttft_s),
        ),
        "tpot": _svg(
            "tpot",
            "95th percentile of the time per output token",
            lambda axes: _line(axes, factors, tpot, times, "s", targets.p95_tpot_s),
        ),
    }


def _memory(axes: Any, memory: Memory) -> None:
    for color, curve in zip(SERIES, memory.curves, strict=False):
        needed = [amount / GIB for amount in curve.needed_bytes]
        width = 2.2 if curve.chosen else 1.2
        axes.plot(memory.contexts_tokens, needed, color=color, linewidth=width, label=curve.kv_dtype)
    usable = memory.usable_bytes / GIB
    axes.axhline(usable, color=LIMIT, linewidth=1.2, linestyle="--")
    axes.annotate("usable", (memory.contexts_tokens[0], usable), (0, 3), textcoords="offset points", color=LIMIT)
    axes.set_xscale("log", base=2)
    ticks = [tokens for tokens in memory.contexts_tokens if tokens in (1 << 10, 1 << 13, 1 << 16, 1 << 18)]
    ticks.append(memory.contexts_tokens[-1])
    axes.set_xticks(ticks, [f"{tokens // 1024}K" if tokens < 1 << 19 else "1M" for tokens in ticks])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens of context", ylabel="GiB")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.92), fontsize=8)


def _throughput(axes: Any, widths: tuple[Width, ...]) -> None:
    seqs = [one.seqs for one in widths]
    total, low = [one.tokens_per_s for one in widths], [one.low_tokens_per_s for one in widths]
    high = [value * value / slow for value, slow in zip(total, low, strict=True)]
    axes.fill_between(seqs, low, high, color=SERIES[0], alpha=0.2, linewidth=0, label="80 % interval")
    axes.plot(seqs, total, color=SERIES[0], linewidth=2, marker="o", markersize=3)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="sequences", ylabel="tokens/s")
    axes.legend(loc="upper left", fontsize=8)


def _line(
    axes: Any, across: list[Any], up: list[float], xlabel: str, ylabel: str, promised: float | None = None
) -> None:
    axes.plot(across, up, color=SERIES[0], linewidth=2, marker="o", markersize=3)
    if promised is not None:
        axes.axhline(promised, color=LIMIT, linewidth=1.2, linestyle="--")
        axes.annotate("promised", (across[0], promised), (0, 3), textcoords="offset points", color=LIMIT)
        if max(up) > 20 * promised:
            axes.set_yscale("log")
    if axes.get_yscale() == "linear":
        axes.set_ylim(0, 1.15 * max(*up, promised or 0))
    if all(isinstance(one, int) for one in across):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=xlabel, ylabel=ylabel)


def _svg(name: str, title: str, draw: Draw) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title, fontsize=9.5, loc="left")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(text.getvalue(), name, title)


def _inline(svg: str, name: str, title: str) -> str:
    """The element alone, as wide as its place, in the page's colours, its ids told apart from other charts'."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
