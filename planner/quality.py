"""How much a smaller cache costs in quality, as an expected KL divergence from the full-precision run.

Weights bring their own figure (`WeightFormat.divergence`). The sum ranks plans: quality first, then headroom. All of
these are estimates. Anchors: on Qwen3.6-35B-A3B (Q8_0 weights, wikitext-2 at 4k) a q8_0 cache cost 0.0016 and a 4-bit
one 0.013 (openclawradar.com, April 2026); on Llama 3 8B a q8_0 cache cost 0.0010 and q5_1 values 0.0018 (llama.cpp pull
request 7412). A bfloat16 recurrent state moved GSM8K by a point at most on Qwen3-Next (SGLang pull request 10258). What
lies between the anchors is interpolated by bits.
"""

KV_DIVERGENCE = {
    "auto": 0.0,
    "bf16": 0.0,
    "f16": 0.0,
    "f32": 0.0,
    "q8_0": 0.0016,
    "int8": 0.0016,
    "int8_per_token_head": 0.0016,
    "8bit": 0.0016,
    "fp8": 0.0025,
    "fp8_e4m3": 0.0025,
    "fp8_e5m2": 0.005,
    "q5_1": 0.004,
    "q5_0": 0.005,
    "q4_1": 0.012,
    "iq4_nl": 0.012,
    "4bit": 0.012,
    "q4_0": 0.013,
    "int4": 0.013,
    "int4_per_token_head": 0.013,
    "nvfp4": 0.013,
}

STATE_DIVERGENCE = {"float32": 0.0, "bfloat16": 0.002}

_UNKNOWN = 0.02  # a type that somebody named and nobody measured: behind every one that was


def kv_divergence(kv_dtype: str) -> float:
    """Expected KL of a cache type; `K/V` pairs take the mean of both."""
    sides = kv_dtype.split("/")
    return sum(KV_DIVERGENCE.get(side, _UNKNOWN) for side in sides) / len(sides)


def divergence(weights_divergence: float, kv_dtype: str, state_dtype: str) -> float:
    return weights_divergence + kv_divergence(kv_dtype) + STATE_DIVERGENCE[state_dtype]
