"""Ollama: llama.cpp's server behind a scheduler of its own, read at git fb30760 of 21 August 2026 (llama.cpp b10488).

On top of `llamacpp.py`:
- `-c num_ctx x parallel -np parallel`, `-b` and `-ub` equal: 512, above 4,096 tokens of context 1024, above 32,768
  tokens 2048, and less again where Ollama's own prediction and 768 MiB or 2 GiB more would not fit. Planned with 512;
  what the larger batch takes is shown as far as there is room.
- no `-ngl` and no `--fit off`: llama.cpp fits the model itself and keeps 1 GiB free on every device, so that GiB cannot
  be used here, and experts go to host memory by themselves.
- its library's tags of these models bring the vision tower, which is loaded in any case; the default tag is Q4_K_M.
- `PredictServerVRAM`, by which it schedules models, counts a cache in every layer, four times the truth.

The settings are the server's environment, so the launch line starts a server, waits, and opens the model:
`OLLAMA_...=... ollama serve & sleep 3; ollama run qwen3.5:9b`. Where a server runs already, set the variables there.
"""

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat, weight_format
from ...profiles.frozen import dataclass, replace
from ...profiles.model import Model
from ..memory import Amount, Memory
from . import llamacpp
from .engine import Allocation, DeviceShare, Engine, Setup
from .launch import base_name, shell_line
from .llamacpp import FIT_MARGIN_BYTES, GIB, SPARE, LlamaCppEstimate
from .llamacpp_launch import gguf_name

ENGINE = Engine(
    name="ollama",
    default_version="0.33.0",
    versions=("0.33.0",),
    source="Ollama git fb30760 (21 August 2026, before the release of 0.33.0): llm, server/routes.go, envconfig",
    parallelism="layers",
    offloads=True,
    copies_cache=True,
)

BATCHES = ((4096, 512), (32768, 1024))  # context up to -> -b and -ub; 2048 beyond
LARGEST_BATCH_TOKENS = 2048
CACHE_TYPES = ("f16", "q8_0", "q4_0")  # OLLAMA_KV_CACHE_TYPE
TAG_SUFFIXES = {"q4_k_m": "", "q8_0": "-q8_0", "gguf-bf16": "-bf16"}
DEFAULT_CTX_TOKENS = ((47, 262144), (23, 32768))  # by GiB of device memory (server/routes.go); 4096 below


def runs_on(device: Device, version: str) -> str | None:
    """Why Ollama cannot run on a device, None where it can."""
    if device.vendor == "intel":
        return "Ollama ships no backend for Intel GPUs but Vulkan, which is experimental there; use llama.cpp"
    return llamacpp.runs_on(device, version)


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """Ollama imports any GGUF file; its library has three types of each model."""
    reason = llamacpp.loads(model, fmt, device, version)
    return reason.replace("llama.cpp", "Ollama") if reason else None


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    """The tags of its library."""
    return ("gguf-bf16", "q8_0", "q4_k_m")


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    return CACHE_TYPES


def estimate(setup: Setup) -> "OllamaEstimate":
    """Raises Unsupported for settings that the engine does not have."""
    if setup.kv_dtype not in CACHE_TYPES:
        raise Unsupported(f"Ollama has no {setup.kv_dtype} cache: give {', '.join(CACHE_TYPES)}, or use llama.cpp")
    if setup.mtp:
        raise Unsupported("Ollama has no multi-token prediction for these models: leave out --mtp, or use llama.cpp")
    weights = weight_format("gguf-bf16") if setup.weights.name == "bf16" else setup.weights
    setup = replace(setup, weights=weights, vision=setup.model.has_vision)
    margin = 0 if setup.devices[0].kind == "cpu" else FIT_MARGIN_BYTES
    sizes = [batch for _, batch in BATCHES] + [LARGEST_BATCH_TOKENS]
    wanted = setup.options.ubatch_tokens
    by_batch = {
        size: llamacpp.estimate(replace(setup, options=replace(setup.options, ubatch_tokens=size)), margin)
        for size in ([wanted] if wanted else sizes)
    }
    return OllamaEstimate(setup, by_batch)


@dataclass(frozen=True, slots=True, eq=False)
class OllamaEstimate:
    """llama.cpp's arithmetic with the smallest batch, and what the batch that Ollama prefers adds."""

    setup: Setup
    by_batch: dict[int, LlamaCppEstimate]

    @property
    def least(self) -> LlamaCppEstimate:
        return next(iter(self.by_batch.values()))

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        return self.least.shortfall_bytes(ctx_tokens, seqs)

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        """The larger batch takes no more than what is surely free."""
        return self.least.is_sure(ctx_tokens, seqs)

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        answer = self.least.allocate(ctx_tokens, seqs)
        batch = self._batch(ctx_tokens)
        devices = answer.devices
        if self.by_batch[batch] is not self.least:
            larger = self.by_batch[batch].allocate(ctx_tokens, seqs).devices
            devices = tuple(map(_with_batch, devices, larger))
        return Allocation(
            devices=devices,
            host=answer.host,
            reasons=answer.reasons,
            warnings=self._warnings(answer, ctx_tokens),
            detail={
                **{key: value for key, value in answer.detail.items() if key != "file"},
                "tag": self._tag(),
                "preferred_batch": batch,
                "default_num_ctx": _default_ctx_tokens(self.setup.devices),
                "predicted_by_ollama_bytes": self._predicted_bytes(ctx_tokens * seqs),
            },
            offloads=answer.offloads,
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        settings = {
            "OLLAMA_CONTEXT_LENGTH": ctx_tokens,
            "OLLAMA_NUM_PARALLEL": seqs,
            "OLLAMA_KV_CACHE_TYPE": self.setup.kv_dtype,
            "OLLAMA_FLASH_ATTENTION": 1,
            "OLLAMA_MAX_LOADED_MODELS": 1,
        }
        server = shell_line([*(f"{name}={value}" for name, value in settings.items()), "ollama", "serve"])
        return f"{server} & sleep 3; {self._made()}{shell_line(['ollama', 'run', self._tag()])}"

    def _made(self) -> str:
        """A file of one's own gets a name in Ollama's store first; `ollama create` takes it from a Modelfile only."""
        model = self.setup.model
        if model.path is None:
            return ""
        name, file = base_name(model), gguf_name(model, self.setup.weights)
        file = file if "/" in file else f"./{file}"  # a bare word would be a model of its store
        written = f"{shell_line(['echo', f'FROM {file}'])} > {shell_line([f'{name}.Modelfile'])}"
        return f"{written}; {shell_line(['ollama', 'create', self._tag(), '-f', f'{name}.Modelfile'])}; "

    def _batch(self, ctx_tokens: int) -> int:
        if len(self.by_batch) == 1:
            return next(iter(self.by_batch))
        return next((batch for limit, batch in BATCHES if ctx_tokens <= limit), LARGEST_BATCH_TOKENS)

    def _tag(self) -> str:
        """`qwen3.5:9b`, with the type behind it where it is not the default; another GGUF by its repository; what was
        read from disk by its name."""
        model, fmt = self.setup.model, self.setup.weights
        if model.path is not None:
            return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in model.name)
        family, _, size = model.name.partition("-")
        if fmt.name in TAG_SUFFIXES and size:
            size = size.split("-")[0] if size[0].isdigit() else size
            return f"{family}:{size}{TAG_SUFFIXES[fmt.name]}"
        return f"hf.co/unsloth/{base_name(model)}-GGUF:{(fmt.file_type or fmt.name).upper()}"

    def _predicted_bytes(self, tokens: int) -> int:
        """`PredictServerVRAM`: the files, and an f16 cache of all layers."""
        model = self.setup.model
        weights = sum(share.weights_bytes for share in self.least.layout.shares) + self.least.host.embedding_bytes
        head = model.hidden_size // model.num_attention_heads
        return weights + 2 * model.num_layers * model.num_key_value_heads * head * tokens * 2

    def _warnings(self, answer: Allocation, ctx_tokens: int) -> tuple[str, ...]:
        found = [warning for warning in answer.warnings if "--" not in warning]
        predicted = self._predicted_bytes(ctx_tokens)
        room = sum(device.usable_bytes for device in self.setup.devices)
        if predicted > room:
            found.append(
                f"Ollama predicts {predicted / GIB:.1f} GiB, for it counts a cache in every layer: it unloads other "
                "models first, and prefers a small batch"
            )
        if self.setup.devices[0].kind != "cpu":
            found.append(
                "1 GiB per device is left free: llama.cpp's own fitting, which Ollama leaves on, moves layers to "
                "host memory otherwise"
            )
        if self.setup.model.has_vision:
            found.append("the vision tower is counted: Ollama's tags of this model bring it")
        return tuple(found)


def _with_batch(share: DeviceShare, larger: DeviceShare) -> DeviceShare:
    """The activation of the larger batch as far as there is room for it."""
    memory, more = share.memory, larger.memory.activation
    doubt = memory.runtime.high - memory.runtime.mid
    added = max(0, min(more.mid - memory.activation.mid, int(SPARE * share.usable_bytes) - doubt - memory.total.mid))
    if not added:
        return share
    activation = memory.activation
    raised = Amount(activation.low, activation.mid + added, activation.high + added)
    return DeviceShare(
        share.device,
        share.usable_bytes,
        Memory(memory.weights, memory.kv_cache, memory.recurrent_state, raised, memory.graph, memory.runtime),
    )


def _default_ctx_tokens(devices: tuple[Device, ...]) -> int:
    memory = sum(device.usable_bytes for device in devices) / GIB
    return next((tokens for least, tokens in DEFAULT_CTX_TOKENS if memory >= least), 4096)
