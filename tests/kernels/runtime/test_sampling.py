"""Which token is drawn: by hand where it can be said, by frequency where it cannot."""

import math
import random

import pytest
import torch

from qwenfit.kernels.runtime.sampling import FIRST_CANDIDATES, Sampling, choose

LOGITS = torch.tensor([[math.log(share) for share in (0.05, 0.5, 0.15, 0.3)]])


def drawn(sampling: Sampling, count: int = 4000) -> list[float]:
    """How often each of the four tokens is drawn at `count` positions."""
    tokens = choose(LOGITS.expand(count, 4), sampling, [(0, position) for position in range(count)])
    return [float((tokens == token).float().mean()) for token in range(4)]


def test_greedy_is_the_most_likely() -> None:
    assert choose(torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]]), Sampling(), [(0, 0), (1, 0)]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), (0.05, 0.5, 0.15, 0.3)),
        (Sampling(1.0, top_k=2), (0, 0.625, 0, 0.375)),
        (Sampling(1.0, top_p=0.6), (0, 0.625, 0, 0.375)),  # 0.5 is not enough for 0.6, so the next one counts, too
        (Sampling(1.0, top_p=0.5), (0, 1, 0, 0)),
        (Sampling(1.0, top_p=1e-9), (0, 1, 0, 0)),
        (Sampling(1.0, top_k=1), (0, 1, 0, 0)),
        (Sampling(1.0, top_k=3, top_p=0.9), (0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95)),  # of what top_k leaves
        (Sampling(0.5), tuple(share / 0.365 for share in (0.0025, 0.25, 0.0225, 0.09))),  # squares, normalised
    ],
)
def test_shares_are_what_they_should_be(sampling: Sampling, expected: tuple[float, ...]) -> None:
    """4,000 draws: three standard deviations are 0.024 at the most, and what is cut off never comes."""
    for found, share in zip(drawn(sampling), expected, strict=True):
        assert abs(found - share) < 0.024
        assert share or not found


def test_a_draw_depends_on_seed_sequence_and_position_only() -> None:
    logits, sampling = torch.randn(3, 100), Sampling(1.0, seed=5)
    places = [(0, 7), (1, 7), (0, 8)]
    together = choose(logits, sampling, places)
    alone = [int(choose(logits[row : row + 1], sampling, [place])) for row, place in enumerate(places)]
    assert together.tolist() == alone
    same_logits = logits[:1].expand(200, 100)
    by_position = choose(same_logits, sampling, [(0, position) for position in range(200)])
    by_sequence = choose(same_logits, sampling, [(sequence, 0) for sequence in range(200)])
    by_seed = [int(choose(logits[:1], Sampling(1.0, seed=seed), [(0, 0)])) for seed in range(200)]
    assert len(set(by_position.tolist())) > 30 and len(set(by_sequence.tolist())) > 30 and len(set(by_seed)) > 30


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_no_more_are_sorted_than_reach_top_p_and_the_draw_is_that_of_all_sorted(spread: float) -> None:
    """Of 5,000 tokens: nearly alike, 0.9 is reached behind the first candidates; apart, within them."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * spread
    sampling, places = Sampling(0.8, top_p=0.9, seed=3), [(row, 5) for row in range(3)]
    shares, order = (logits.double() / 0.8).softmax(-1).sort(descending=True)
    needed = ((shares.cumsum(-1) - shares) < 0.9).sum(-1)
    assert (needed > FIRST_CANDIDATES).all() == (spread < 1)
    for row, place in enumerate(places):
        kept = shares[row, : needed[row]]
        goal = random.Random("3 {} {}".format(*place)).random() * kept.sum()
        expected = order[row, int((kept.cumsum(-1) <= goal).sum())]
        assert choose(logits, sampling, places)[row] == expected


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: give 0"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0: give a share above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_settings_are_checked(told: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**told)  # type: ignore[arg-type]
