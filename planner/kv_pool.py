"""The cache arithmetic of an engine alone, without devices: what it would print at boot for that much memory."""

from typing import Any

from ..profiles.errors import BadInput, UnknownName
from ..profiles.model import Model

ENGINES = ("vllm", "sglang", "llama.cpp")


def kv_pool(
    model: str | Model = "qwen3.5-9b",
    engine: str = "vllm",
    version: str | None = None,
    tp: int = 1,
    kv_dtype: str | None = None,
    state_dtype: str = "float32",
    prefix_caching: bool | None = None,
    mtp: int = 0,
    pool_bytes: int | None = None,
    ctx_tokens: int = 262144,
    *,
    pp: int = 1,
    kernel_block_tokens: int = 16,
    radix: bool | None = None,
    strategy: str = "extra_buffer",
    max_running_requests: int | None = None,
    max_mamba_cache_size: int | None = None,
    page_tokens: int = 1,
    seqs: int = 1,
    batch: int | None = None,
    ubatch: int | None = None,
    outputs: int | None = None,
    flash_attn: bool | None = None,
    kv_unified: bool | None = None,
) -> Any:
    """What an engine makes of its cache, in bytes and tokens of one rank. Settings of another engine are passed over.

    vllm: `VllmPool`. `pool_bytes` is the cache alone; `prefix_caching` defaults to the version's own; `mtp` counts
    draft tokens; attention pages are rounded to `kernel_block_tokens`, which are 128 on its CPU backend.
    sglang: `SglangPool`. `pool_bytes` is what it calls rest memory; `mtp` counts draft steps; `radix` and `strategy`
    (extra_buffer, no_buffer) decide the slots of a request; the limits are those of its flags of the same names.
    llama.cpp: the bytes of its buffers (`engines/llamacpp_cache.py`) for `seqs` slots.

    Raises ValueError with a sentence where the memory is too small, UnknownName for names that the engine has not.
    """
    if engine not in ENGINES:
        raise UnknownName(f"the cache arithmetic of {engine!r} is not known: give one of {', '.join(ENGINES)}")
    if isinstance(model, str):
        from ..profiles.model_catalog import model as look_up

        model = look_up(model)
    if engine == "llama.cpp":
        from .engines.llamacpp_cache import kv_pool as llamacpp_pool

        asked = {
            "version": version,
            "kv_dtype": kv_dtype,
            "batch": batch,
            "ubatch": ubatch,
            "outputs": outputs,
            "flash_attn": flash_attn,
            "kv_unified": kv_unified,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        return llamacpp_pool(model, ctx_tokens=ctx_tokens, seqs=seqs, mtp=mtp, **given)
    if pool_bytes is None:
        raise BadInput("pool_bytes is missing: how many bytes the cache may take on one rank")
    kv_dtype = kv_dtype or "bf16"
    if engine == "vllm":
        from .engines import vllm_pool

        version = version or vllm_pool.DEFAULT_VERSION
        if prefix_caching is None:
            prefix_caching = vllm_pool.prefix_caching_default(version)
        cut = vllm_pool.layout(model, version, tp, pp, kv_dtype, state_dtype, prefix_caching, mtp, kernel_block_tokens)
        return vllm_pool.pool(cut, version, pool_bytes, ctx_tokens)
    from .engines import sglang_pool

    if radix is None:
        radix = prefix_caching is not False
    sizes = sglang_pool.cells(model, tp, pp, kv_dtype, state_dtype, radix, strategy, mtp)
    return sglang_pool.pool(
        sizes, pool_bytes, ctx_tokens, radix, max_running_requests, max_mamba_cache_size, page_tokens
    )
