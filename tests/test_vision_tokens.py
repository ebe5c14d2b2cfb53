"""Tokens of images and videos: sizes published for the family's processors, and their bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.profiles import BadInput
from qwenfit.profiles.vision_tokens import image_tokens, video_tokens


@pytest.mark.parametrize(
    ("width", "height", "tokens"),
    [(1024, 1024, 1024), (1920, 1080, 2040), (3840, 2160, 8160), (4096, 4096, 16384), (16, 16, 64), (1, 1, 64)],
)
def test_published_image_sizes(width, height, tokens):
    assert image_tokens(width, height) == tokens


def test_an_hour_of_video_is_limited_by_all_its_pixels():
    assert video_tokens(256, 256, 2) == 2 * 64  # 4 frames, two to a token, 8 x 8 tokens each
    assert 9_000 < video_tokens(1920, 1080, 3600) <= 12_288


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_no_image_leaves_the_processors_bounds(width, height):
    try:
        tokens = image_tokens(width, height)
    except BadInput:
        assert max(width, height) > 200 * min(width, height)
    else:
        assert 64 <= tokens <= 16_384


@given(st.integers(240, 4000), st.integers(240, 4000), st.floats(0.1, 10_000))
def test_no_video_leaves_the_processors_bounds(width, height, duration_s):
    assert 2 <= video_tokens(width, height, duration_s) <= 12_288


@pytest.mark.parametrize("sides", [(0, 10), (-5, 10), (10**7, 10**6), (1, 1000)])
def test_impossible_sides_are_refused(sides):
    with pytest.raises(BadInput, match="sides"):
        image_tokens(*sides)


@pytest.mark.parametrize("duration_s", [0, -1, float("nan"), float("inf")])
def test_impossible_durations_are_refused(duration_s):
    with pytest.raises(BadInput, match="duration"):
        video_tokens(640, 480, duration_s)
