"""`qwen-plan devices` and `qwen-plan models`: what has a profile."""

import sys
from typing import NamedTuple

from ..profiles.device import Device
from ..profiles.device_names import devices, has_word
from ..profiles.errors import UnknownName
from ..profiles.model import Model
from ..profiles.model_catalog import models
from .output import clean, columns, screen, write

GIB = 1 << 30
CONV_STATE_BYTES = 2  # the convolution's state is kept in bf16


class Catalog(NamedTuple):
    """A catalog laid out for every rendering. `records` are the JSON, one per row."""

    kind: str
    titles: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: tuple[int, ...]
    records: list[dict[str, object]]


def list_devices(wanted: str, form: str) -> None:
    """Devices whose name, title, vendor or architecture has `wanted` in it."""
    found = [one for one in devices() if has_word(one, wanted.lower())]
    titles = ("name", "device", "memory", "usable", "GB/s", "bf16 TFLOPS", "capability", "watt")
    rows = [_device_row(one) for one in found]
    _show(Catalog("devices", titles, rows, (2, 3, 4, 5, 7), [device_record(one) for one in found]), wanted, form)


def list_models(wanted: str, form: str) -> None:
    """Models whose name, repository or architecture has `wanted` in it."""
    found = [one for one in models() if wanted.lower() in " ".join((one.name, one.repo, one.architecture)).lower()]
    titles = ("name", "repository", "parameters", "checkpoint", "KV per token", "state per sequence", "context")
    rows = [_model_row(one) for one in found]
    _show(Catalog("models", titles, rows, (2, 3, 4, 5, 6), [model_record(one) for one in found]), wanted, form)


def kv_bytes_per_token(model: Model) -> int:
    """Keys and values of one token in bf16: only full-attention layers have them."""
    return model.full_attention_layers * model.num_key_value_heads * model.head_dim * 2 * 2


def state_bytes_per_sequence(model: Model) -> int:
    """Recurrent state in float32 and convolution state in bf16 of one sequence, however long it is."""
    convolution = (model.linear_conv_kernel_dim - 1) * model.conv_dim * CONV_STATE_BYTES
    return model.linear_attention_layers * (model.state_elements * 4 + convolution)


def _show(catalog: Catalog, wanted: str, form: str) -> None:
    if not catalog.rows:
        raise UnknownName(f"no {catalog.kind} match {wanted!r:.100}: `qwen-plan {catalog.kind}` lists all of them")
    if form == "json":
        from json import dumps

        write(dumps({"schema": 1, catalog.kind: catalog.records}, indent=2, allow_nan=False) + "\n")
    elif form == "markdown":
        from .markdown import grid

        write("\n".join([*grid(catalog.titles, catalog.rows, catalog.right), ""]))
    else:
        write(_table(catalog))


def _table(catalog: Catalog) -> str:
    lines = columns([catalog.titles, *(tuple(map(clean, row)) for row in catalog.rows)], catalog.right)
    if screen(sys.stdout).color:
        lines[0] = f"\x1b[1m{lines[0]}\x1b[0m"
    return "\n".join([*lines, ""])


def _device_row(device: Device) -> tuple[str, ...]:
    bandwidth = device.memory_bandwidth_bytes_per_s
    bf16 = device.flops_per_s.get("bf16")
    return (
        device.name,
        device.title,
        f"{device.memory_bytes / GIB:.0f} GiB",
        f"{device.usable_bytes / GIB:.1f} GiB",
        f"{bandwidth / 1e9:,.0f}" if bandwidth else "-",
        f"{bf16 / 1e12:,.1f}" if bf16 else "-",
        device.compute_capability or "-",
        str(device.power_w or "-"),
    )


def device_record(device: Device) -> dict[str, object]:
    """Every figure of a device, as JSON takes it."""
    values = {name: getattr(device, name) for name in device.__slots__}
    return {name: dict(value) if hasattr(value, "items") else value for name, value in values.items()}


def _model_row(model: Model) -> tuple[str, ...]:
    return (
        model.name,
        model.repo,
        f"{model.parameters / 1e9:.2f} B",
        f"{model.checkpoint_bytes / GIB:.2f} GiB",
        f"{kv_bytes_per_token(model) / 1024:.0f} KiB",
        f"{state_bytes_per_sequence(model) / (1 << 20):.1f} MiB",
        f"{model.max_position_embeddings:,}",
    )


def model_record(model: Model) -> dict[str, object]:
    """What a plan depends on, as JSON."""
    return {
        "name": model.name,
        "repo": model.repo,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "checkpoint_bytes": model.checkpoint_bytes,
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "state_bytes_per_sequence": state_bytes_per_sequence(model),
        "max_ctx_tokens": model.max_position_embeddings,
        "full_attention_layers": model.full_attention_layers,
        "linear_attention_layers": model.linear_attention_layers,
        "num_experts": model.num_experts,
        "vision": model.vision is not None,
        "max_image_tokens": model.vision.max_image_tokens if model.vision else 0,
        "max_video_tokens": model.vision.max_video_tokens if model.vision else 0,
        "mtp": model.mtp_num_hidden_layers > 0,
        "source": model.source,
    }
