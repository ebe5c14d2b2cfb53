"""What `qwen-quant` shows: a line while it works, and pages for what came of it, as text or as one JSON document."""

import json as json_module
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from .output import columns

if TYPE_CHECKING:
    from ..quant.evaluate import Evaluation
    from ..quant.fit import Fitted
    from ..quant.inspection import Inspection
    from ..quant.pipeline import Sizes, Summary
    from ..quant.recorder import Progress

SCHEMA = 1
WORST = 8
BAR = 40
PROGRESS_BAR = 20


class ProgressLine:
    """One line with a bar that is written over on a terminal; elsewhere a line per layer."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.terminal, self.layer, self.shown = stream, stream.isatty(), -1, ""

    def begin(self) -> None:
        """Before the first module, while everything is copied that is not quantized."""
        if self.terminal:
            self._write_over("copying what is not quantized")

    def show(self, progress: "Progress") -> None:
        """After every module."""
        where = f"layer {min(progress.layer + 1, progress.layers)}/{progress.layers}"
        module = ".".join(progress.module.rsplit(".", 2)[-2:])
        error = "" if progress.error is None else f"  error {progress.error:.2e}"
        left = "" if progress.seconds_left is None else f"  {duration(progress.seconds_left)} left"
        text = f"{where}  {module}{error}{left}"
        if self.terminal:
            filled = "#" * round(PROGRESS_BAR * progress.layer / progress.layers)
            self._write_over(f"[{filled.ljust(PROGRESS_BAR, '.')}] {text}")
        elif progress.layer != self.layer:
            self.layer = progress.layer
            self.stream.write(f"{where}{left}\n")

    def show_sensitivity(self, layer: int, layers: int) -> None:
        """After every layer whose sensitivity was measured."""
        text = f"sensitivity of layer {layer}/{layers}"
        if self.terminal:
            self._write_over(text)
        else:
            self.stream.write(f"{text}\n")

    def close(self) -> None:
        """Ends the line."""
        if self.shown:
            self.stream.write("\n")
            self.shown = ""

    def _write_over(self, text: str) -> None:
        self.stream.write(f"\r{text.ljust(len(self.shown))}")
        self.stream.flush()
        self.shown = text


def summary_page(summary: "Summary", as_json: bool, fitted: "Fitted | None" = None) -> str:
    """What was made, its worst modules, and where it fits."""
    if as_json:
        return _document(asdict(summary) | {"schema": SCHEMA} | _fit_json(fitted))
    rows = [
        ("checkpoint", summary.target),
        ("size", f"{size(summary.bytes)} of {size(summary.source_bytes)} ({summary.bytes / summary.source_bytes:.0%})"),
        ("bits per weight", f"{summary.bits_per_weight:.2f} in {len(summary.results):,} quantized modules"),
        ("calibration", summary.calibration),
        ("time", duration(summary.seconds) + (" since it was resumed" if summary.resumed else "")),
        ("peak memory", size(summary.peak_memory_bytes)),
    ]
    if fitted:
        rows.append(("fits", _fit_line(fitted)))
    lines = columns(rows)
    measured = sorted((one for one in summary.results if one.error is not None), key=lambda one: -(one.error or 0))
    if measured:
        worst = [(one.module, str(one.bits), f"{one.error:.2e}") for one in measured[:WORST]]
        lines += ["", "Largest errors of outputs, relative and squared:", *columns(worst, right=(1, 2), indent="  ")]
    if summary.fallbacks:
        lines += [
            "",
            f"No calibration token reached {len(summary.fallbacks)} matrices of experts; README.md lists them.",
        ]
    return "\n".join(lines) + "\n"


def dry_run_page(sizes: "Sizes", as_json: bool, fitted: "Fitted | None" = None) -> str:
    """What would be made."""
    if as_json:
        return _document(asdict(sizes) | {"schema": SCHEMA} | _fit_json(fitted))
    share, made = sizes.bytes / sizes.source_bytes, f"{size(sizes.bytes)} of {size(sizes.source_bytes)}"
    line = f"{made} ({share:.0%}), {sizes.bits_per_weight:.2f} bits per weight in {sizes.modules:,} modules\n"
    return line if fitted is None else f"{line}Fits {_fit_line(fitted)}.\n"


def does_not_fit_page(fitted: "Fitted", as_json: bool) -> str:
    """Not even all modules at 4 bits fit: by how much, and what may help."""
    if as_json:
        return _document({"schema": SCHEMA} | _fit_json(fitted))
    goal, plan = fitted.goal, fitted.plan
    lines = [
        f"Does not fit {goal.device} at {goal.ctx_tokens:,} tokens x {goal.seqs}, with every module at 4 bits: "
        f"{size(-fitted.spare_bytes)} too much in {_engine(fitted)}.",
        *(f"  {reason}" for reason in plan.reasons),
    ]
    if fitted.advice:
        lines += ["", "What to change:", *(f"  {one.change}: {one.effect}" for one in fitted.advice)]
    return "\n".join(lines) + "\n"


def _fit_line(fitted: "Fitted") -> str:
    goal, raised = fitted.goal, len(fitted.raised)
    where = f"{goal.device} at {goal.ctx_tokens:,} tokens x {goal.seqs} in {_engine(fitted)}"
    share = f"{raised} of {len(fitted.sensitivities)} groups of modules at 8 bits"
    return f"{where}, {size(fitted.spare_bytes)} to spare; {share}"


def _engine(fitted: "Fitted") -> str:
    plan = fitted.plan
    return f"{plan.engine} {plan.engine_version} with the KV cache in {plan.kv_dtype}"


def _fit_json(fitted: "Fitted | None") -> dict[str, Any]:
    if fitted is None:
        return {}
    plan = fitted.plan
    groups = {name: [asdict(group) for group in getattr(fitted, name)] for name in ("raised", "sensitivities")}
    goal = asdict(fitted.goal)
    advice = [asdict(one) for one in fitted.advice]
    return {
        "fit": {
            **goal,
            "fits": plan.fits,
            "advice": advice,
            "spare_bytes": fitted.spare_bytes,
            **groups,
            "plan": plan.to_json(),
        }
    }


def inspect_page(found: "Inspection", as_json: bool) -> str:
    """Modules by layer, and their sums."""
    if as_json:
        modules = [asdict(module) for module in found.modules]
        sums = {"bytes": found.bytes, "weights": found.weights, "bits_per_weight": found.bits_per_weight}
        return _document({"schema": SCHEMA, "path": found.path, **sums, "modules": modules})
    head = ("module", "form", "shape", "bits", "group", "MB")
    rows = [
        (
            module.name,
            module.form,
            " x ".join(map(str, module.shape)),
            str(module.bits),
            "" if module.group_size is None else str(module.group_size),
            f"{module.bytes / 1e6:.2f}",
        )
        for module in found.modules
    ]
    quantized = found.quantized_bits_per_weight
    sums = f"{size(found.bytes)}, {found.weights:,} weights, {found.bits_per_weight:.2f} bits each"
    sums += f" ({quantized:.2f} in quantized modules)" if quantized else ""
    return "\n".join([*columns([head, *rows], right=(3, 4, 5)), "", sums]) + "\n"


def eval_page(found: "Evaluation", as_json: bool) -> str:
    """Perplexity and divergence, and a bar per layer."""
    if as_json:
        return _document(asdict(found) | {"schema": SCHEMA})
    rows = [
        ("tokens", f"{found.tokens:,}"),
        ("perplexity", f"{found.perplexity:.4f}, the reference's {found.reference_perplexity:.4f}"),
        ("KL, mean", f"{found.mean_kl:.5f} +- {found.mean_kl_error:.5f} nats per token"),
        ("KL, 99 %, 99.9 %, max", f"{found.kl_99:.4f}, {found.kl_99_9:.4f}, {found.max_kl:.4f}"),
        ("same first choice", f"{found.top1_agreement:.2%}"),
    ]
    largest = max(found.layer_errors, default=0) or 1
    bars = [
        f"  {number:3} {error:8.2e} {'#' * max(1, round(BAR * error / largest))}"
        for number, error in enumerate(found.layer_errors)
    ]
    return "\n".join([*columns(rows), "", "Relative error of hidden states behind each layer:", *bars]) + "\n"


def size(amount_bytes: int) -> str:
    """Decimal, as files are measured: 9.05 GB."""
    return f"{amount_bytes / 1e9:.2f} GB" if amount_bytes >= 1e9 else f"{amount_bytes / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """1 h 5 min, 12 min, 40 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _document(data: dict[str, Any]) -> str:
    return json_module.dumps(data, indent=2, allow_nan=False) + "\n"
