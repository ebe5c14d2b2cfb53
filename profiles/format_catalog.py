"""The weight formats with a fixed name: what they are, the divergence expected of them, whose releases they follow.

Divergence is the mean KL divergence from the bf16 model, on the scale of a sweep over 46 GGUF files of Qwen3.5-9B
with importance matrices (reddit r/LocalLLaMA 1rr72lr, March 2026): Q8_0 0.00081, Q4_K_M 0.0087, Q4_K_S 0.0108, IQ4_XS
0.0127 are from there. It ranks formats; it does not predict a benchmark. A recipe moves it by a factor of four at the
same nominal bits (0.0087 to 0.0353 for Q4_K_M). All other figures are estimates:
- GGUF types that the sweep does not name: the Llama-3-8B scoreboard of llama.cpp's perplexity README, times 0.31
  (Q4_K_M there 0.0282).
- int8 before fp8: r/LocalLLaMA's vLLM measurements on Qwen3.6-35B-A3B (Phaelon74, 2026), order only.
- int4 and nvfp4: between Q4_K_S and Q4_0, with the ratio of Qwen3.5-397B's AWQ 0.0241 to NVFP4 0.0353 against FP8
  (voipmonitor/rtx6kpro, benchmarks/kld-evaluation.md, 2026).
"""

from .frozen import dataclass

_SWEEP = "Qwen3.5-9B GGUF sweep, r/LocalLLaMA 1rr72lr"
_SCALED = "llama.cpp perplexity README, Llama-3-8B scoreboard x 0.31 (estimated)"


@dataclass(frozen=True, slots=True, eq=False)
class Fixed:
    """A row of the catalog. `releases`: names of the models that the publisher released so; empty: made by anyone."""

    family: str
    title: str
    bits: int
    divergence: float
    source: str
    group_size: int | None = None
    symmetric: bool = True
    releases: tuple[str, ...] = ()


def _gguf(title: str, bits: int, divergence: float, source: str, group_size: int | None, symmetric: bool) -> Fixed:
    return Fixed("gguf", title, bits, divergence, source, group_size, symmetric)


def _k_quant(name: str, bits: int, divergence: float, source: str = _SCALED) -> Fixed:
    """Super-blocks of 256 with sub-blocks of 16 or 32, asymmetric for Q2_K, Q4_K and Q5_K."""
    return _gguf(f"GGUF {name}", bits, divergence, source, 16 if bits in (2, 3, 6) else 32, bits in (3, 6))


FIXED: dict[str, Fixed] = {
    "bf16": Fixed("safetensors", "bf16 as published", 16, 0.0, "the model itself"),
    "int8-w8a8": Fixed(
        "safetensors",
        "int8 weights per channel and int8 activations (compressed-tensors)",
        8,
        0.0018,
        "between q8_0 and q6_k (estimated)",
    ),
    "fp8": Fixed(
        "safetensors",
        "Qwen's official FP8: e4m3 in blocks of 128 x 128",
        8,
        0.0015,
        "between int8 and q6_k (estimated)",
        group_size=128,
        releases=(
            "qwen3.5-27b",
            "qwen3.5-35b-a3b",
            "qwen3.5-122b-a10b",
            "qwen3.5-397b-a17b",
            "qwen3.6-27b",
            "qwen3.6-35b-a3b",
            "qwen3-next-80b",
        ),
    ),
    "gptq-int4-official": Fixed(
        "safetensors",
        "Qwen's official GPTQ-Int4: MLP or routed experts only",
        4,
        0.015,
        "int4 with attention kept (estimated)",
        group_size=128,
        releases=("qwen3.5-27b", "qwen3.5-35b-a3b", "qwen3.5-122b-a10b", "qwen3.5-397b-a17b"),
    ),
    "nvfp4": Fixed(
        "safetensors",
        "NVIDIA's NVFP4",
        4,
        0.03,
        "1.47 x int4, as NVFP4 to AWQ on Qwen3.5-397B (estimated)",
        group_size=16,
        releases=("qwen3.5-122b-a10b", "qwen3.5-397b-a17b", "qwen3.6-27b", "qwen3.6-35b-a3b"),
    ),
    "mlx-8bit": Fixed("mlx", "MLX 8 bit", 8, 0.001, "like int8, embeddings too (estimated)", 64, False),
    "mlx-6bit": Fixed("mlx", "MLX 6 bit", 6, 0.004, "between 5 and 8 bit (estimated)", 64, False),
    "mlx-5bit": Fixed("mlx", "MLX 5 bit", 5, 0.01, "between 4 and 6 bit (estimated)", 64, False),
    "mlx-4bit": Fixed("mlx", "MLX 4 bit", 4, 0.028, "round to nearest, embeddings too (estimated)", 64, False),
    "gguf-bf16": _gguf("GGUF BF16", 16, 0.0, "the model itself", None, True),
    "gguf-f16": _gguf("GGUF F16", 16, 0.00003, "llama.cpp perplexity README, BF16 against FP16", None, True),
    "q8_0": _gguf("GGUF Q8_0", 8, 0.00081, _SWEEP, 32, True),
    "q6_k": _k_quant("Q6_K", 6, 0.0017),
    "q5_k_m": _k_quant("Q5_K_M", 5, 0.0033),
    "q5_k_s": _k_quant("Q5_K_S", 5, 0.0051),
    "q5_1": _gguf("GGUF Q5_1", 5, 0.0056, _SCALED, 32, False),
    "q5_0": _gguf("GGUF Q5_0", 5, 0.0069, _SCALED, 32, True),
    "q4_k_m": _k_quant("Q4_K_M", 4, 0.0087, _SWEEP),
    "q4_k_s": _k_quant("Q4_K_S", 4, 0.0108, _SWEEP),
    "iq4_nl": _gguf("GGUF IQ4_NL", 4, 0.0122, _SCALED, 32, True),
    "iq4_xs": _gguf("GGUF IQ4_XS", 4, 0.0127, _SWEEP, 32, True),
    "q4_1": _gguf("GGUF Q4_1", 4, 0.0222, _SCALED, 32, False),
    "q4_0": _gguf("GGUF Q4_0", 4, 0.0223, _SCALED, 32, True),
    "mxfp4_moe": _gguf(
        "GGUF MXFP4_MOE: routed experts MXFP4, the rest Q8_0", 4, 0.0225, "beside Q4_0 (estimated)", 32, True
    ),
    "q3_k_l": _k_quant("Q3_K_L", 3, 0.0227),
    "q3_k_m": _k_quant("Q3_K_M", 3, 0.0262),
    "iq3_m": _gguf("GGUF IQ3_M", 3, 0.0318, _SCALED, 32, True),
    "iq3_s": _gguf("GGUF IQ3_S", 3, 0.0345, _SCALED, 32, True),
    "iq3_xs": _gguf("GGUF IQ3_XS", 3, 0.043, _SCALED, 32, True),
    "iq3_xxs": _gguf("GGUF IQ3_XXS", 3, 0.0569, _SCALED, 32, True),
    "q3_k_s": _k_quant("Q3_K_S", 3, 0.0619),
    "iq2_m": _gguf("GGUF IQ2_M", 2, 0.101, _SCALED, 32, True),
    "q2_k": _k_quant("Q2_K", 2, 0.103),
    "q2_k_s": _k_quant("Q2_K_S", 2, 0.125),
    "iq2_s": _gguf("GGUF IQ2_S", 2, 0.136, _SCALED, 32, True),
    "iq2_xs": _gguf("GGUF IQ2_XS", 2, 0.169, _SCALED, 32, True),
    "iq2_xxs": _gguf("GGUF IQ2_XXS", 2, 0.252, _SCALED, 32, True),
    "iq1_m": _gguf("GGUF IQ1_M", 1, 0.432, _SCALED, 32, True),
    "iq1_s": _gguf("GGUF IQ1_S", 1, 0.7, _SCALED, 32, True),
    "checkpoint": Fixed("checkpoint", "as the checkpoint's own headers say", 16, 0.0, "read, not compared"),
}

ALIASES: dict[str, str] = {
    "bfloat16": "bf16",
    "f16": "gguf-f16",
    "fp8-official": "fp8",
    "gptq-int4": "gptq-int4-official",
    "gptq": "int4-gptq",
    "awq": "int4-awq",
    "mlx-4": "mlx-4bit",
    "mlx-8": "mlx-8bit",
    "mxfp4": "mxfp4_moe",
}

# Expected divergence of compressed-tensors integers, calibrated (GPTQ or AWQ), by bits and group size; -1 is one
# scale per channel.
INTEGER_DIVERGENCE: dict[int, dict[int, float]] = {
    4: {32: 0.014, 64: 0.017, 128: 0.02, 256: 0.024, -1: 0.06},
    8: {32: 0.00082, 64: 0.00085, 128: 0.0009, 256: 0.001, -1: 0.0012},
}
SYMMETRIC_INT4_PENALTY = 1.2

# What quantizing a piece adds, by bits. The 9B study of Brooooooklyn/Qwen3.5-9B-unsloth-mlx finds lm_head the least
# sensitive tensor and the embedding next; MTP only costs acceptance of drafts, vision only images: small figures that
# keep the order.
PIECE_DIVERGENCE: dict[str, dict[int, float]] = {
    "head": {8: 0.0002, 4: 0.002},
    "embed": {8: 0.0002, 4: 0.003},
    "mtp": {8: 0.00005, 4: 0.0002},
    "vision": {8: 0.0001, 4: 0.002},
}
