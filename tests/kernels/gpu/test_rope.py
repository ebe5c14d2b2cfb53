"""`rope` in Triton against the twin: rotated where it must be, copied where it must not."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu.rope import rope  # noqa: E402
from qwenfit.kernels.reference import attention as reference_attention  # noqa: E402

PARAMETERS = {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}


def tables(tokens: int, size: int, factor: float = 0.25) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.randint(0, 300_000, (3, tokens), generator=torch.Generator().manual_seed(tokens))
    return reference_attention.rope_tables(positions, {**PARAMETERS, "partial_rotary_factor": factor}, size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "heads", "size", "factor"), [(7, 3, 256, 0.25), (17, 2, 128, 0.25), (1, 1, 64, 1.0)]
)
def test_rotates_the_first_dimensions_only(
    dtype: torch.dtype, tokens: int, heads: int, size: int, factor: float
) -> None:
    projected = torch.randn(tokens, 2 * heads * size, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = projected[:, heads * size :].unflatten(-1, (heads, size))  # queries out of a projection: strided by token
    cos, sin = tables(tokens, size, factor)
    result, rotated = rope(x, cos, sin), int(size * factor)
    truth = reference_attention.rope(x.double(), cos, sin)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), truth, rtol=ulp, atol=ulp)  # one rounding, and products in float32
    assert torch.equal(result[..., rotated:], x[..., rotated:])
    assert result.is_contiguous()


def test_position_zero_changes_nothing_and_lengths_are_kept() -> None:
    x = torch.randn(5, 2, 256, generator=torch.Generator().manual_seed(2))
    cos, sin = tables(5, 256)
    turned = rope(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    cos, sin = reference_attention.rope_tables(torch.zeros(5), PARAMETERS, 256)
    assert torch.equal(rope(x, cos, sin), x)


def test_nothing_is_written_past_the_last_row(monkeypatch: pytest.MonkeyPatch) -> None:
    x, (cos, sin) = torch.randn(3, 1, 64), tables(3, 64)
    buffer = torch.full((4 * 64,), float("nan"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: buffer[: 3 * 64].view(3, 1, 64))
    rope(x, cos, sin)
    assert buffer[: 3 * 64].isfinite().all() and buffer[3 * 64 :].isnan().all()


def test_refuses_what_does_not_fit() -> None:
    x, (cos, sin) = torch.randn(3, 2, 64), tables(3, 64)
    with pytest.raises(ValueError, match="bf16, fp16 or fp32"):
        rope(x.double(), cos, sin)
    with pytest.raises(ValueError, match="side by side"):
        rope(x.mT.contiguous().mT, cos, sin)
    with pytest.raises(ValueError, match="T = 3"):
        rope(x, cos[:2], sin[:2])
    with pytest.raises(ValueError, match="powers of two"):
        rope(x, cos[:, :3].contiguous(), sin[:, :3].contiguous())
    with pytest.raises(ValueError, match="float32"):
        rope(x, cos.double(), sin)
    assert rope(x[:0], cos[:0], sin[:0]).shape == (0, 2, 64)
