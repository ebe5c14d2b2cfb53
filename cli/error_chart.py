"""The chart of `qwen-quant eval --plot`: how far the hidden state is off behind every layer."""

import os
from typing import TYPE_CHECKING

from ..profiles.errors import BadInput, Unsupported, install_hint

if TYPE_CHECKING:
    from ..quant.evaluate import Evaluation

KINDS = (".svg", ".png", ".pdf")
INCHES_PER_LAYER = 0.22


def check_chart(path: str) -> None:
    """`Unsupported` without matplotlib, `BadInput` for a name that is no picture's: before hours of work, not after."""
    if os.path.splitext(path)[1].lower() not in KINDS:
        raise BadInput(f"--plot {path}: give a name that ends in {', '.join(KINDS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise Unsupported(f"--plot needs matplotlib: {install_hint('report')}") from error


def draw_errors(found: "Evaluation", title: str, path: str) -> None:
    """A bar per layer, root mean square of the error over that of the hidden state. `BadInput` where it cannot be
    written."""
    from matplotlib.figure import Figure

    errors = found.layer_errors
    figure = Figure(figsize=(max(5.0, 1.5 + INCHES_PER_LAYER * len(errors)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.bar(range(len(errors)), errors, color="#4269d0", width=0.8)
    for number, bar in enumerate(bars):
        bar.set_gid(f"layer-{number}")
    axes.set_xlabel("layer")
    axes.set_ylabel("error of the hidden state, relative")
    axes.set_title(f"{title}\nmean KL {found.mean_kl:.4f} nats, perplexity {found.perplexity:.3f}", fontsize=10)
    axes.margins(x=0.01)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    try:
        figure.savefig(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
