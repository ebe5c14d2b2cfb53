"""GGML's blocks: layouts as the gguf package reads them, and errors against those of llama.cpp's own quantizer.

The errors of llama.cpp were measured once with `ggml_quantize_chunk` of libggml-base b11434 on the matrices made here
(256 x 2048 of seed 0, normal, and Student's t with 4 degrees of freedom; importance: rand^4 + 0.001 of seed 1):
relative squared error, weighted by the importance where there is one. Ours are to be at most as large.
"""

from typing import Any

import pytest
import torch

from qwenfit.profiles.ggml import GGML_TYPES
from qwenfit.quant.gguf_blocks import KINDS, decode, encode, row_bytes

LLAMA_CPP: dict[tuple[str, str, bool], float] = {
    ("Q4_0", "normal", False): 7.3852e-03,
    ("Q4_0", "normal", True): 5.6847e-03,
    ("Q4_0", "student", False): 1.3511e-02,
    ("Q4_0", "student", True): 1.1377e-02,
    ("Q4_1", "normal", False): 6.1329e-03,
    ("Q4_1", "normal", True): 3.6952e-03,
    ("Q4_1", "student", False): 8.8361e-03,
    ("Q4_1", "student", True): 5.5572e-03,
    ("Q8_0", "normal", False): 2.8569e-05,
    ("Q8_0", "normal", True): 2.8727e-05,
    ("Q8_0", "student", False): 5.4769e-05,
    ("Q8_0", "student", True): 5.5586e-05,
    ("Q4_K", "normal", False): 5.1011e-03,
    ("Q4_K", "normal", True): 3.8331e-03,
    ("Q4_K", "student", False): 7.5734e-03,
    ("Q4_K", "student", True): 5.9092e-03,
    ("Q6_K", "normal", False): 3.1442e-04,
    ("Q6_K", "normal", True): 2.3970e-04,
    ("Q6_K", "student", False): 5.3287e-04,
    ("Q6_K", "student", True): 4.3739e-04,
}


def made(kind: str, rows: int = 256, columns: int = 2048) -> Any:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "normal":
        return normal * 0.02
    others = torch.randn(4, rows, columns, generator=generator)
    return normal / others.square().mean(0).sqrt() * 0.01


def made_importance(columns: int = 2048) -> Any:
    return torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-3


def error_of(weight: Any, kind: str, importance: Any = None) -> float:
    shares = torch.ones(weight.shape[1]) if importance is None else importance
    difference = decode(encode(weight, kind, importance), kind) - weight
    return float((difference.square() * shares).sum() / (weight.square() * shares).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_gguf_package_reads_the_same_numbers(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="its readers are the truth: pip install gguf")
    from gguf.quants import dequantize

    weight = made("student", 16, 768)
    weight[3] = 0
    weight[4, :256] = -0.5
    blocks = encode(weight, kind)
    assert blocks.shape == (16, 768 // GGML_TYPES[kind][0] * GGML_TYPES[kind][1]) and blocks.dtype == torch.uint8
    theirs = torch.from_numpy(dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind]))
    ours = decode(blocks, kind)
    assert torch.equal(ours, theirs)
    assert bool((ours[3] == 0).all())
    assert float((ours[4, :256] + 0.5).abs().max()) < 0.004  # fp16 has 11 bits, Q8_0 seven of its own
    assert bool(torch.isfinite(ours).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["normal", "student"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_is_at_most_llama_cpps(kind: str, shape: str, weighted: bool) -> None:
    found = error_of(made(shape), kind, made_importance() if weighted else None)
    theirs = LLAMA_CPP[kind, shape, weighted]
    print(f"{kind} {shape} {'weighted' if weighted else 'plain'}: {found:.3e}, llama.cpp {theirs:.3e}")
    assert found <= theirs * 1.0005


def test_importance_moves_the_error_to_columns_that_do_not_matter() -> None:
    weight, importance = made("student", 64, 512), made_importance(512)
    for kind in ("Q4_0", "Q4_1", "Q4_K", "Q6_K"):
        plain = decode(encode(weight, kind), kind) - weight
        weighted = decode(encode(weight, kind, importance), kind) - weight
        assert (weighted.square() * importance).sum() < 0.95 * (plain.square() * importance).sum(), kind


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Nor on threads: chunks are cut by size."""
    weight, importance = made("student", 300, 512), made_importance(512)
    threads = torch.get_num_threads()
    try:
        for kind in KINDS:
            torch.set_num_threads(1)
            whole = encode(weight, kind, importance)
            assert torch.equal(whole[37:40], encode(weight[37:40], kind, importance))
            torch.set_num_threads(2)
            assert torch.equal(whole, encode(weight, kind, importance))
    finally:
        torch.set_num_threads(threads)


def test_importance_of_any_size_and_of_none() -> None:
    """Experts that the calibration never reached have a Hessian of zeros; a scale of the Hessian changes nothing."""
    weight, importance = made("normal", 4, 256), made_importance(256)
    for kind in KINDS:
        assert torch.equal(encode(weight, kind, torch.zeros(256)), encode(weight, kind))
        for factor in (2.0**-60, 2.0**60):
            assert torch.equal(encode(weight, kind, importance * factor), encode(weight, kind, importance))


def test_a_column_that_no_token_excited_still_counts() -> None:
    """Of a group of 32 with one column that counts, the others are not all lost."""
    weight, importance = made("normal", 64, 256), torch.zeros(256)
    importance[::32] = 1
    for kind in KINDS:
        difference = decode(encode(weight, kind, importance), kind) - weight
        assert difference.norm() < 0.3 * weight.norm(), kind


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 384 are no whole number of Q4_K blocks of 256"):
        encode(torch.zeros(2, 384), "Q4_K")
    assert row_bytes("Q6_K", 512) == 420
