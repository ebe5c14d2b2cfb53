"""What the first kernel leaves for the others: decays that keep their digits, norms, padding that changes nothing."""

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
from qwenfit.kernels.gpu.delta_gates import CHUNK_TOKENS, FACTORS, SHORT_TOKENS, delta_gates_kernel  # noqa: E402
from qwenfit.kernels.reference.delta import delta_inputs  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 32


def run(qkv: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, bounds: list[int]) -> list[Tensor]:
    """table, decays, factors, remains, norms of one key head and three value heads, for two chunks."""
    shapes = ((2, 2), (2, 3, 2, CHUNK_TOKENS), (2, 3, FACTORS, CHUNK_TOKENS), (2, 3), (2, 1, 2, CHUNK_TOKENS))
    found = [torch.full(shape, torch.nan, device=DEVICE) for shape in shapes]
    found[0] = torch.full((2, 2), -7, dtype=torch.int32, device=DEVICE)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    batch = len(bounds) - 1
    delta_gates_kernel[(1, 2)](
        qkv,
        a,
        b,
        A_log,
        dt_bias,
        cu_seqlens,
        *found,
        SIZE**-0.5,
        qkv.stride(0),
        a.stride(0),
        b.stride(0),
        batch,
        NK=1,
        NV=3,
        DK=SIZE,
        CHUNK=CHUNK_TOKENS,
        SHORT=SHORT_TOKENS,
        BATCH=batch,
    )
    return found


def test_two_chunks_of_one_sequence() -> None:
    """70 tokens with a reset of -inf and one of -100 in the first chunk, against float64.

    e^(c_i - c_j) of tokens after the resets is good to 2^-20 though c is -228 there, where neighbouring float32 numbers
    are 1.5e-5 apart.
    """
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(70, 5 * SIZE, generator=generator).to(DEVICE)
    a, b = (torch.randn(70, 3, generator=generator).to(DEVICE) for _ in range(2))
    A_log, dt_bias = torch.zeros(3, device=DEVICE), torch.full((3,), -5.0, device=DEVICE)
    a[5], a[20] = 1e30, 105.0
    table, decays, factors, remains, norms = run(qkv, a, b, A_log, dt_bias, [0, 70])
    assert table.tolist() == [[0, 64], [64, 6]]
    qkv, a, b, A_log, dt_bias = (x.double() for x in (qkv, a, b, A_log, dt_bias))
    q, k, _, g, beta = delta_inputs(qkv, a, b, A_log, dt_bias, SIZE, SIZE, 1)

    late = slice(21, 64)
    stretch = g[late].cumsum(0)[:, None] - g[late].cumsum(0)[None]
    high, low = (decays[0, :, part, late].T for part in range(2))
    found = (high[:, None] - high[None]) + (low[:, None] - low[None])
    torch.testing.assert_close(found.double(), stretch, rtol=0, atol=2.0**-20)
    assert (remains[0] == 0).all()  # after the resets nothing of the state is left
    torch.testing.assert_close(remains[1].double(), g[64:].sum(0).exp(), rtol=1e-6, atol=0)

    lengths = [qkv.double()[:, part * SIZE : (part + 1) * SIZE].norm(dim=1) for part in range(2)]
    torch.testing.assert_close(norms[1, 0, 0, :6].double(), SIZE**-0.5 / lengths[0][64:], rtol=1e-5, atol=0)
    inverse, since, until = 1 / lengths[1][64:], g[64:].cumsum(0).exp(), (g[64:].sum(0) - g[64:].cumsum(0)).exp()
    expected = [
        beta[64:] * inverse[:, None],
        beta[64:],
        beta[64:] * since * inverse[:, None],
        until * inverse[:, None],
        since * SIZE**-0.5 / lengths[0][64:, None],
    ]
    for factor, values in enumerate(expected):
        torch.testing.assert_close(factors[1, :, factor, :6].T.double(), values, rtol=1e-5, atol=1e-9)
    assert q.shape == k.shape

    # Rows past the end: no strength, no decay, and all of it written.
    assert (factors[1, :, :3, 6:] == 0).all()
    assert torch.equal(decays[1, :, :, 6:], decays[1, :, :, 5:6].expand(-1, -1, 58))
    assert all(tensor.isfinite().all() for tensor in (decays, factors, remains, norms))


def test_a_chunk_that_is_not_there_is_said_to_be_empty() -> None:
    values = torch.ones(20, 5 * SIZE, device=DEVICE)
    gates = torch.ones(20, 3, device=DEVICE)
    table, decays, *_ = run(values, gates, gates, gates[0], gates[0], [0, 20])
    assert table[:, 1].tolist() == [20, 0] and decays[1].isnan().all()


def test_a_short_sequence_has_no_chunk() -> None:
    values = torch.ones(36, 5 * SIZE, device=DEVICE)
    gates = torch.ones(36, 3, device=DEVICE)
    table, decays, *_ = run(values, gates, gates, gates[0], gates[0], [0, 16, 33])
    assert table.tolist()[0] == [16, 17] and table[1, 1] == 0 and decays[1].isnan().all()
