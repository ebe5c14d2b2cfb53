"""MLX-LM on Apple silicon: a cache that grows in steps, and prefill whose scores are written out in full.

Read in mlx-lm 0.32.2 and mlx 0.32.2:
- `models/qwen3_5.py` (`sanitize`): the vision tower and multi-token prediction are dropped at load.
- `models/cache.py`: `KVCache` grows by 256 tokens at a time in the model's dtype; `QuantizedKVCache` packs codes and
  keeps a scale and a bias in bf16 for every 64; `ArraysCache` keeps 3 rows of convolution input in bf16 and a float32
  state (`models/gated_delta.py`) and is never quantized.
- `server.py`: requests are batched (`BatchGenerator`) unless `--kv-bits` is set: then they are served one by one.
  Finished conversations stay in memory, up to `--prompt-cache-size` of them (10 by default; the cache of a hybrid
  cannot be trimmed, so every turn is one more); `--prompt-cache-bytes` is enforced only when a request arrives.
- mlx `backend/metal/scaled_dot_product_attention.cpp`: with more than 8 queries, head dimension 256 and a mask array,
  which the batch cache always makes, there is no fused kernel: scores [H, step, ctx] in bf16 and a mask [step, ctx] in
  bool. M5's fused path (August 2026) needs the implicit causal mask that only `mlx_lm.generate` passes.
- `generate.py` (`wired_limit`): warns when weights pass 0.9 of Metal's recommended working set, which is all there is.

The slope with the context is what was measured: 88.3 kB per token on Qwen3.6-35B-A3B (mlx-lm issue 1480); keys and
values take 20,480 B, scores 65,536 B, the mask 2,048 B of it.
"""

from ...profiles.device import Device
from ...profiles.errors import Unsupported
from ...profiles.formats import WeightFormat
from ...profiles.frozen import dataclass
from ...profiles.model import Model
from ..memory import Amount, Memory, estimated, exactly
from ..weights import weight_table
from .engine import Allocation, DeviceShare, Engine, Setup
from .launch import base_name, shell_line

ENGINE = Engine(
    name="mlx",
    default_version="0.32.2",
    versions=("0.32.2",),
    source="mlx-lm 0.32.2: models/cache.py, models/qwen3_5.py, server.py; mlx 0.32.2: fast.cpp, backend/metal",
    parallelism="single",
)

GIB = 1 << 30
CACHE_STEP_TOKENS = 256
PREFILL_STEP_TOKENS = 2048
WARNING_SHARE = 0.9
KV_BITS = {"bf16": 16, "8bit": 8, "4bit": 4}
KV_GROUP = 64  # --kv-group-size


@dataclass(frozen=True, slots=True)
class Constants:
    """What Metal and MLX's lazy evaluation add; no line of source says it."""

    layers_in_flight_percent: Amount  # layers whose buffers live at one time while a step is computed
    runtime: Amount  # compiled kernels and small buffers inside the working set
    source: str


CONSTANTS = Constants(
    layers_in_flight_percent=Amount(150, 240, 350),
    runtime=estimated(0, 64e6, 300e6),
    source=(
        "layers in flight: peak memory of Qwen3.6-35B-A3B-4bit at 8,000 to 192,000 tokens less weights, caches and "
        "scores (mlx-lm issue 1480: mlx 0.32.0, M5 Max); runtime: not measured"
    ),
)


def runs_on(device: Device, version: str) -> str | None:
    if device.vendor != "apple":
        return "MLX is planned for Apple silicon only: use llama.cpp or vLLM here"
    return None


def loads(model: Model, fmt: WeightFormat, device: Device, version: str) -> str | None:
    """Why mlx-lm cannot load that format."""
    if fmt.family == "mlx" or fmt.name == "bf16":
        return None
    if fmt.family == "checkpoint" and (model.quantization or {}).get("method", "mlx") == "mlx":
        return None
    return f"mlx-lm runs MLX checkpoints and bf16, not {fmt.name}: use mlx-4bit or mlx-8bit"


def weight_formats(model: Model, device: Device) -> tuple[str, ...]:
    return ("bf16", "mlx-8bit", "mlx-6bit", "mlx-5bit", "mlx-4bit")


def kv_dtypes(device: Device, version: str) -> tuple[str, ...]:
    """`8bit` and `4bit` are `--kv-bits`."""
    return tuple(KV_BITS)


def estimate(setup: Setup) -> "MlxEstimate":
    """Raises Unsupported for settings that mlx-lm does not have."""
    _refuse(setup)
    model, bits = setup.model, KV_BITS[setup.kv_dtype]
    step = setup.options.max_num_batched_tokens or PREFILL_STEP_TOKENS
    elements = 2 * model.full_attention_layers * model.num_key_value_heads * model.head_dim
    return MlxEstimate(
        setup=setup,
        weights_bytes=weight_table(model, setup.weights, 1).text,
        kv_bytes_per_token=elements * 2 if bits == 16 else elements * bits // 8 + elements * 4 // KV_GROUP,
        state_bytes_per_seq=model.linear_attention_layers
        * (2 * (model.linear_conv_kernel_dim - 1) * model.conv_dim + 4 * model.state_elements),
        step_tokens=step,
        score_bytes_per_pair=2 * model.num_attention_heads + 1,
        layer_bytes_per_token=_layer_bytes_per_token(model),
    )


@dataclass(frozen=True, slots=True, eq=False)
class MlxEstimate:
    """`mlx_lm.server` with `seqs` conversations of `ctx_tokens`, one prompt being read at a time."""

    setup: Setup
    weights_bytes: int
    kv_bytes_per_token: int
    state_bytes_per_seq: int
    step_tokens: int
    score_bytes_per_pair: int  # of one query token and one context token: bf16 scores of all heads, and the mask
    layer_bytes_per_token: int

    @property
    def one_at_a_time(self) -> bool:
        return self.setup.kv_dtype != "bf16"

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        step = min(ctx_tokens, self.step_tokens)
        short = (
            self.weights_bytes
            + CONSTANTS.runtime.mid
            + seqs * (self._stored_tokens(ctx_tokens) * self.kv_bytes_per_token + self.state_bytes_per_seq)
            + step * ctx_tokens * self.score_bytes_per_pair
            + step * self.layer_bytes_per_token * CONSTANTS.layers_in_flight_percent.mid // 100
            - self.setup.devices[0].usable_bytes
        )
        return max(short, 1) if seqs > 1 and self.one_at_a_time else short

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self.allocate(ctx_tokens, seqs).is_sure

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        device = self.setup.devices[0]
        memory = Memory(
            weights=exactly(self.weights_bytes),
            kv_cache=self._with_kept(seqs, self._stored_tokens(ctx_tokens) * self.kv_bytes_per_token),
            recurrent_state=self._with_kept(seqs, self.state_bytes_per_seq),
            activation=self._activation(ctx_tokens),
            runtime=CONSTANTS.runtime,
        )
        total = memory.total
        return Allocation(
            devices=(DeviceShare(device, device.usable_bytes, memory),),
            reasons=self._reasons(total.mid, seqs),
            warnings=self._warnings(memory, total.mid, ctx_tokens),
            detail={
                "cache_tokens": self._stored_tokens(ctx_tokens),
                "kv_bytes_per_token": self.kv_bytes_per_token,
                "state_bytes_per_sequence": self.state_bytes_per_seq,
                "prefill_step_size": self.step_tokens,
                "score_bytes": min(ctx_tokens, self.step_tokens) * ctx_tokens * self.score_bytes_per_pair,
                "working_set_bytes": device.usable_bytes,
                "kept_conversations": self._kept,
            },
        )

    def command(self, ctx_tokens: int, seqs: int) -> str:
        words: list[object] = ["mlx_lm.server", "--model", self._checkpoint, "--prefill-step-size", self.step_tokens]
        words += ["--prompt-concurrency", 1, "--decode-concurrency", seqs, "--prompt-cache-size", self._kept]
        if self.one_at_a_time:
            words += ["--kv-bits", KV_BITS[self.setup.kv_dtype], "--kv-group-size", KV_GROUP, "--quantized-kv-start", 0]
        return shell_line(words)

    @property
    def _kept(self) -> int:
        """Finished conversations that the launch line lets the server keep for the next turn."""
        return 1 if self.setup.options.prefix_caching else 0

    def _with_kept(self, seqs: int, per_seq_bytes: int) -> Amount:
        """Exact for running sequences; a kept conversation may be there on top, or not."""
        running = seqs * per_seq_bytes
        return Amount(running, running, running + self._kept * per_seq_bytes, exact=not self._kept)

    def _activation(self, ctx_tokens: int) -> Amount:
        step = min(ctx_tokens, self.step_tokens)
        scores = step * ctx_tokens * self.score_bytes_per_pair
        layer, flight = step * self.layer_bytes_per_token, CONSTANTS.layers_in_flight_percent
        low, mid, high = (layer * bound // 100 for bound in (flight.low, flight.mid, flight.high))
        # while a layer's cache grows, the old buffer lives beside the new one
        growth = ctx_tokens * self.kv_bytes_per_token // max(1, self.setup.model.full_attention_layers)
        return Amount(scores + low, scores + mid, scores + high + growth)

    @staticmethod
    def _stored_tokens(ctx_tokens: int) -> int:
        return -(-ctx_tokens // CACHE_STEP_TOKENS) * CACHE_STEP_TOKENS

    def _reasons(self, needed_bytes: int, seqs: int) -> tuple[str, ...]:
        device, reasons = self.setup.devices[0], []
        if needed_bytes > device.usable_bytes:
            reasons.append(
                f"{device.name} needs {needed_bytes / GIB:.2f} GiB and Metal's working set is "
                f"{device.usable_bytes / GIB:.2f} GiB"
            )
        if seqs > 1 and self.one_at_a_time:
            reasons.append("mlx_lm.server runs one sequence at a time with --kv-bits: ask for 1, or a bf16 cache")
        return tuple(reasons)

    def _warnings(self, memory: Memory, needed_bytes: int, ctx_tokens: int) -> tuple[str, ...]:
        usable = self.setup.devices[0].usable_bytes
        warnings = [f"mlx_lm.server has no context limit: this is the memory at {ctx_tokens:,} tokens per request"]
        if WARNING_SHARE * usable < needed_bytes <= usable:
            warnings.append(
                f"{needed_bytes / usable:.0%} of Metal's working set ({usable / GIB:.2f} GiB): close other programs "
                "or raise the limit with sudo sysctl iogpu.wired_limit_mb"
            )
        kept = (memory.kv_cache.high - memory.kv_cache.mid) + (memory.recurrent_state.high - memory.recurrent_state.mid)
        if kept and needed_bytes + kept > usable >= needed_bytes:
            warnings.append(
                f"the conversation kept for the next turn takes up to {kept / GIB:.2f} GiB more: --prompt-cache-size 0 "
                "forgets it"
            )
        if ctx_tokens > self.setup.model.native_context_tokens:
            warnings.append("mlx_lm.server has no flag for rope scaling: put YaRN's rope_parameters into config.json")
        return tuple(warnings)

    @property
    def _checkpoint(self) -> str:
        model, fmt = self.setup.model, self.setup.weights
        if model.stored or fmt.family != "mlx":
            return model.repo
        owner = "mlx-community" if model.path is None else "."  # of one's own weights nobody published a conversion
        return f"{owner}/{base_name(model)}-{fmt.name.removeprefix('mlx-')}"


def _refuse(setup: Setup) -> None:
    if setup.kv_dtype not in KV_BITS:
        raise Unsupported(f"mlx-lm has no {setup.kv_dtype} cache: give {', '.join(KV_BITS)}")
    if setup.state_dtype != "float32":
        raise Unsupported("mlx-lm keeps the recurrent state in float32: leave out --state-dtype")
    if setup.vision:
        raise Unsupported("mlx-lm drops the vision tower (images need mlx-vlm): leave out --vision, or use llama.cpp")
    if setup.mtp:
        raise Unsupported("mlx-lm drops the multi-token prediction layer: leave out --mtp, or use llama.cpp")
    if setup.options.offload_experts:
        raise Unsupported("Apple's memory is one: there is nowhere to offload experts to")


def _layer_bytes_per_token(model: Model) -> int:
    """Every buffer that one Gated DeltaNet layer and its MLP write for one prompt token, in bf16.

    Delta rule: projection, joined convolution input, its output and silu, z, q and k twice, outputs. MLP: gate, up and
    their product; experts: the routed rows sorted, gate, up, product, down, unsorted, weighted.
    """
    values = model.linear_num_value_heads * model.linear_value_head_dim
    keys = model.linear_num_key_heads * model.linear_key_head_dim
    delta_rule = 4 * model.conv_dim + 3 * values + 4 * keys + 3 * model.hidden_size
    mlp = 3 * model.intermediate_size + 3 * model.hidden_size
    if model.is_moe:
        rows = model.num_experts_per_tok
        mlp = rows * (4 * model.hidden_size + 3 * model.moe_intermediate_size) + 3 * model.hidden_size
        mlp += 3 * model.shared_expert_intermediate_size + 2 * model.num_experts
    return 2 * (delta_rule + mlp)
