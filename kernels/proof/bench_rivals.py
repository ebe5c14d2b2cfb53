"""Other people's kernels for the same work, whichever of them can be imported: what the GPU bench compares with.

    matmul      cuBLAS (torch, the matrix dequantized beforehand), tinygemm (torch's `_weight_int4pack_mm`, on which
                torchao's int4 weights run), gemlite, vLLM's Marlin
    attention   torch's scaled_dot_product_attention, FlashInfer; neither has the output gate
    delta rule  flash-linear-attention; its gates (softplus, sigmoid) are computed beforehand

Each maker gets the same values, lays them out as its kernel wants them, and raises whatever keeps it from running (not
installed, another version, a shape it does not take): the bench writes down the reason. A rival's result is judged
before it is timed, too. Interfaces as of gemlite 0.6, vLLM 0.32, flash-linear-attention 0.6 and FlashInfer 0.7.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layout.kv_cache import KVCache
from ..layout.packing import QuantizedWeight, dequantize, unpack_int4
from ..reference.delta import delta_inputs
from .bench_work import Rival

Makers = dict[str, Callable[[], Rival]]
Copies = Callable[[int], int]
PAGE_TOKENS = 64
WORKSPACE_BYTES = 128 << 20


def matmul_rivals(x: Tensor, weight: QuantizedWeight, copies_for: Copies) -> Makers:
    """For x [T, K] times a symmetric weight [N, K]."""
    makers: Makers = {"cublas": lambda: _by_linear(x, weight, copies_for)}
    if weight.bits == 4:
        makers |= {
            "tinygemm": lambda: _by_tinygemm(x, weight, copies_for),
            "gemlite": lambda: _by_gemlite(x, weight, copies_for),
            "marlin": lambda: _by_marlin(x, weight, copies_for),
        }
    return makers


def _rows_of_codes(weight: QuantizedWeight) -> Tensor:
    """Codes 0 ... 15, uint8 [N, K]."""
    return unpack_int4(weight.codes)[: weight.rows, : weight.columns]


def _rows_of_scales(weight: QuantizedWeight) -> Tensor:
    """Scales [N, K / G]."""
    return weight.scales[: weight.columns // weight.group_size, : weight.rows].T.contiguous()


def _by_linear(x: Tensor, weight: QuantizedWeight, copies_for: Copies) -> Rival:
    matrix = dequantize(weight, x.dtype)
    matrices = [matrix, *(matrix.clone() for _ in range(copies_for(matrix.nbytes) - 1))]
    return Rival(lambda i: F.linear(x, matrices[i]), len(matrices), matrix.nbytes)


def _by_tinygemm(x: Tensor, weight: QuantizedWeight, copies_for: Copies) -> Rival:
    if x.dtype != torch.bfloat16:
        raise ValueError("takes bfloat16 only")
    codes, scales = _rows_of_codes(weight), _rows_of_scales(weight).T.contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    metadata = torch.stack((scales, torch.zeros_like(scales)), dim=-1).to(x.dtype)  # (code - 8) scale + zero
    size_bytes = packed.nbytes + metadata.nbytes
    weights = [(packed.clone(), metadata.clone()) for _ in range(copies_for(size_bytes))]
    multiply = torch.ops.aten._weight_int4pack_mm
    return Rival(lambda i: multiply(x, weights[i][0], weight.group_size, weights[i][1]), len(weights), size_bytes)


def _by_gemlite(x: Tensor, weight: QuantizedWeight, copies_for: Copies) -> Rival:
    from gemlite.helper import A16Wn  # type: ignore[import-not-found]

    codes, scales = _rows_of_codes(weight), _rows_of_scales(weight)
    zeros = torch.full_like(scales, weight.zero_point)
    count = copies_for(weight.bytes)
    maker = A16Wn(device=str(x.device), dtype=x.dtype)
    layers = [
        maker.from_weights(codes, scales.to(x.dtype), zeros.to(x.dtype), weight.bits, weight.group_size)
        for _ in range(count)
    ]
    return Rival(lambda i: layers[i](x), count, weight.bytes)


def _by_marlin(x: Tensor, weight: QuantizedWeight, copies_for: Copies) -> Rival:
    from vllm import _custom_ops as ops  # type: ignore[import-not-found]
    from vllm.model_executor.layers.quantization.utils import marlin_utils  # type: ignore[import-not-found]
    from vllm.scalar_type import scalar_types  # type: ignore[import-not-found]

    rows, columns = weight.rows, weight.columns
    codes = _rows_of_codes(weight).T.to(torch.int32).unflatten(0, (columns // 8, 8))  # [K / 8, 8, N], as in GPTQ
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)[:, None]
    words = (codes << shifts).sum(1, dtype=torch.int32)
    packed = ops.gptq_marlin_repack(words, columns, rows, weight.bits)
    scales = _rows_of_scales(weight).T.contiguous().to(x.dtype)
    scales = marlin_utils.marlin_permute_scales(scales, columns, rows, weight.group_size)
    workspace = marlin_utils.marlin_make_workspace_new(x.device)
    weights = [(packed.clone(), scales.clone()) for _ in range(copies_for(weight.bytes))]

    def run(i: int) -> Tensor:
        return ops.marlin_gemm(
            *(x, None, weights[i][0], None, weights[i][1], None, None, None, workspace, scalar_types.uint4b8),
            *(x.shape[0], rows, columns),
            use_fp32_reduce=True,
        )

    return Rival(run, len(weights), weight.bytes)


def decode_rivals(q: Tensor, gate: Tensor, caches: list[KVCache], context: int) -> Makers:
    """For one token of every sequence: q [B, 1, H, D] over `context` tokens of the caches."""
    if caches[0].is_int8:
        return {}
    return {
        "sdpa": lambda: _by_sdpa(q.transpose(1, 2), gate.transpose(1, 2), caches, context, False),
        "flashinfer": lambda: _by_flashinfer_decode(q[:, 0], gate[:, 0], caches, context),
    }


def prefill_rivals(q: Tensor, gate: Tensor, caches: list[KVCache], context: int) -> Makers:
    """For one prompt: q [T, H, D], the last T of `context` tokens of sequence 0."""
    if caches[0].is_int8:
        return {}
    return {
        "sdpa": lambda: _by_sdpa(q.transpose(0, 1)[None], gate.transpose(0, 1)[None], caches, context, True),
        "flashinfer": lambda: _by_flashinfer_prefill(q, gate, caches, context),
    }


def _gated(gate: Tensor) -> Callable[[Tensor], Tensor]:
    """Attention without a gate -> what is compared with the truth."""
    return lambda returned: returned * torch.sigmoid(gate)


def _by_sdpa(q: Tensor, gate: Tensor, caches: list[KVCache], context: int, causal: bool) -> Rival:
    tokens = q.shape[2]
    mask = None
    if causal and tokens < context:
        mask = torch.ones(tokens, context, dtype=torch.bool, device=q.device).tril(context - tokens)

    def run(i: int) -> Tensor:
        keys, values = (stored[:, :, :context] for stored in (caches[i].keys, caches[i].values))
        plain = causal and mask is None
        return F.scaled_dot_product_attention(q, keys, values, mask, is_causal=plain, enable_gqa=True)

    def result(returned: Tensor) -> Tensor:
        return (returned * torch.sigmoid(gate)).transpose(1, 2)

    return Rival(run, len(caches), caches[0].bytes, result)


def _by_flashinfer_decode(q: Tensor, gate: Tensor, caches: list[KVCache], context: int) -> Rival:
    import flashinfer  # type: ignore[import-not-found]

    sequences, heads, size = q.shape
    key_heads, padded = caches[0].keys.shape[1:3]
    pages = padded // PAGE_TOKENS
    used = -(-context // PAGE_TOKENS)

    def paged(stored: Tensor) -> Tensor:
        """[sequences * pages, KV, PAGE_TOKENS, D]"""
        cut = stored.unflatten(2, (pages, PAGE_TOKENS)).transpose(1, 2)
        return cut.reshape(sequences * pages, key_heads, PAGE_TOKENS, size)

    tables = [(paged(cache.keys), paged(cache.values)) for cache in caches]
    each = torch.arange(sequences, dtype=torch.int32, device=q.device)
    page = torch.arange(used, dtype=torch.int32, device=q.device)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(sequences + 1, dtype=torch.int32, device=q.device) * used,
        (each[:, None] * pages + page).flatten(),
        torch.full_like(each, context - (used - 1) * PAGE_TOKENS),
        *(heads, key_heads, size, PAGE_TOKENS),
        q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )
    return Rival(lambda i: wrapper.run(q, tables[i]), len(tables), caches[0].bytes, _gated(gate))


def _by_flashinfer_prefill(q: Tensor, gate: Tensor, caches: list[KVCache], context: int) -> Rival:
    import flashinfer  # type: ignore[import-not-found]

    def run(i: int) -> Tensor:
        keys, values = (stored[0, :, :context] for stored in (caches[i].keys, caches[i].values))
        return flashinfer.single_prefill_with_kv_cache(q, keys, values, causal=True, kv_layout="HND")

    return Rival(run, len(caches), caches[0].bytes, _gated(gate))


def delta_rivals(inputs: tuple[Tensor, ...], start: Tensor, key_heads: int, copies: int, size_bytes: int) -> Makers:
    """inputs: qkv, a, b ([B, 1, ...] of a step, [T, ...] of a prompt), A_log, dt_bias; start [B, NV, DV, DK]."""
    return {"fla": lambda: _by_fla(inputs, start, key_heads, copies, size_bytes)}


def _by_fla(inputs: tuple[Tensor, ...], start: Tensor, key_heads: int, copies: int, size_bytes: int) -> Rival:
    from fla.ops.gated_delta_rule import (  # type: ignore[import-not-found]
        chunk_gated_delta_rule,
        fused_recurrent_gated_delta_rule,
    )

    qkv, a, b, A_log, dt_bias = inputs
    *_, value_heads, value_dim, key_dim = start.shape
    is_step = qkv.dim() == 3
    if not is_step:
        qkv, a, b = qkv[None], a[None], b[None]
    keys, values = key_heads * key_dim, value_heads * value_dim
    q, k, v = qkv.split((keys, keys, values), dim=-1)
    q, k = (x.unflatten(-1, (key_heads, key_dim)).contiguous() for x in (q, k))
    v = v.unflatten(-1, (value_heads, value_dim)).contiguous()
    *_, g, beta = delta_inputs(qkv, a, b, A_log, dt_bias, key_dim, value_dim, key_heads)
    beta = beta.to(qkv.dtype)
    states = [start.mT.contiguous() for _ in range(copies)]  # [B, NV, DK, DV]
    call: Any = fused_recurrent_gated_delta_rule if is_step else chunk_gated_delta_rule

    def run(i: int) -> Tensor:
        return call(
            *(q, k, v, g, beta),
            initial_state=states[i],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )[0]

    return Rival(run, copies, size_bytes)
