"""A published run as the speed model sees it: its setup, its work, and what was measured."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from ..profiles.box import devices_of
from ..profiles.device import Device
from ..profiles.formats import WeightFormat, weight_format
from ..profiles.frozen import dataclass
from ..profiles.model import Model
from ..profiles.model_catalog import model
from .factors import Factors, backend_of, chain, chunk_tokens, family_of, is_ggml
from .steps import StepTime, step_time
from .work import Work, work


@dataclass(frozen=True, eq=False)
class Run:
    """One row of profiles/speed_runs.json."""

    row: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.row["id"]

    @property
    def publisher(self) -> str:
        return self.row["publisher"]

    @property
    def engine(self) -> str:
        return self.row["engine"]

    @property
    def mtp(self) -> int:
        return self.row.get("mtp", 0)

    @property
    def batch(self) -> int:
        return self.row.get("batch", 1)

    @property
    def host_share(self) -> float:
        return self.row.get("host_share", 0.0)

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.row.get("decode_tokens_per_s")

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return self.row.get("prefill_tokens_per_s")

    @cached_property
    def page(self) -> str:
        return self.row["source"].partition("#")[0]

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        machine = self.row.get("machine")
        return devices_of(self.row["device"]) if machine is None else (_machine(machine, self.row["source"]),)

    @cached_property
    def model(self) -> Model:
        return model(self.row["model"])

    @cached_property
    def weights(self) -> WeightFormat:
        return weight_format(self.row["weights"])

    @cached_property
    def backend(self) -> str:
        return self.row.get("backend") or backend_of(self.engine, self.devices[0])

    @cached_property
    def tp(self) -> int:
        return len(self.devices) if self.row.get("split") == "tensor" else 1

    @cached_property
    def chunk_tokens(self) -> int:
        return self.row.get("chunk_tokens") or chunk_tokens(self.engine, self.backend)

    @cached_property
    def work(self) -> Work:
        return work(
            self.model,
            self.weights,
            self.devices,
            self.row.get("kv_dtype", "auto"),
            tp=self.tp,
            mtp=self.mtp,
            host_share=self.host_share,
            file_bytes=self.row.get("file_bytes"),
            ggml=is_ggml(self.engine),
        )

    @cached_property
    def keys(self) -> tuple[str, ...]:
        link = self.row.get("link", "pcie")
        return chain(self.engine, self.backend, self.devices[0], self.weights, self.model.is_moe, link)

    @cached_property
    def place(self) -> tuple[str, str, str]:
        """Engine, backend and device: what has to be the same for a case to count as measured before."""
        return self.engine, self.backend, family_of(self.devices[0])

    def step_time(self, factors: Factors) -> StepTime:
        return step_time(self.work, factors)

    def decode(self, factors: Factors) -> float:
        """Tokens per second of the whole batch, as the model has it."""
        return self.step_time(factors).decode_tokens_per_s(self.batch, self.row["depth_tokens"])

    def prefill(self, factors: Factors) -> float:
        tokens = self.row["prompt_tokens"]
        depth_tokens = self.row.get("prompt_depth_tokens", 0)
        return tokens / self.step_time(factors).whole_prompt_s(tokens, self.chunk_tokens, depth_tokens)


def _machine(values: Mapping[str, Any], source: str) -> Device:
    """A machine that is measured and not in the catalog."""
    rates = {name: values[f"{name}_flops_per_s"] for name in ("fp32", "fp16") if f"{name}_flops_per_s" in values}
    return Device(
        name=values["name"],
        title=values["name"],
        vendor=values["vendor"],
        architecture=values["architecture"],
        kind="cpu" if values["vendor"] == "cpu" else "unified",
        memory_bytes=1 << 34,
        usable_bytes=1 << 34,
        memory_bandwidth_bytes_per_s=values["memory_bandwidth_bytes_per_s"],
        flops_per_s=rates,
        source=source,
        checked="2026-11-22",
    )
