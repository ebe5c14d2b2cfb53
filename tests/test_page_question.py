"""What a browser or a program may ask, and in which words: bounds, names of the catalogs only, links that come back."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pydantic = pytest.importorskip("pydantic")

from qwenfit.cli.page_question import (  # noqa: E402
    CONTEXTS,
    DeviceKeys,
    OptionsKeys,
    PricesKeys,
    Question,
    from_query,
    query,
    slider_step,
    tokens_text,
)
from qwenfit.planner.request import Options, Prices, Request  # noqa: E402
from qwenfit.planner.tokens import parse_tokens  # noqa: E402
from qwenfit.profiles.errors import BadInput, QwenfitError, UnknownName  # noqa: E402
from qwenfit.profiles.frozen import fields  # noqa: E402

Pairs = list[tuple[str, str]]


NOT_OVER_HTTP = {"calibration"}  # a file of the server's


def pairs(text: str) -> Pairs:
    from urllib.parse import parse_qsl

    return parse_qsl(text, keep_blank_values=True)


@pytest.mark.parametrize(
    ("ours", "planners"), [(Question, Request()), (OptionsKeys, Options()), (PricesKeys, Prices())], ids=str
)
def test_the_fields_and_their_defaults_are_the_planners(ours: Any, planners: Any) -> None:
    """A field that the planner gains is missing here, and this says so."""
    assert list(ours.model_fields) == [field.name for field in fields(planners) if field.name not in NOT_OVER_HTTP]
    for field in fields(planners):
        if field.name not in {"devices", "options", "prices", *NOT_OVER_HTTP}:
            assert getattr(ours(), field.name) == getattr(planners, field.name), field.name


def test_the_request_is_what_was_asked() -> None:
    asked = from_query(pairs("model=9b&gpu=rtx3090&n=2&gpu=RTX 3060&n=1&ctx=256K&seqs=4&mtp=2&kv=fp8&vision=on"))
    assert asked.request() == Request(
        model="9b",
        devices=("rtx3090", "rtx3090", "rtx3060"),
        ctx_tokens=262144,
        seqs=4,
        mtp=2,
        kv_dtype="fp8",
        vision=True,
    )


def test_boxes_are_asked_in_the_commands_words() -> None:
    asked = from_query(pairs("gpu=h100-sxm&n=8&nodes=2&interconnect=8xib-ndr&tp=8&pp=2&dp=1&ep=1"))
    assert asked.request() == Request(
        devices=("h100-sxm",) * 8, nodes=2, interconnect="8xib-ndr", tp=8, pp=2, dp=1, ep=1
    )


def test_a_link_that_was_left_in_the_form_of_one_box_is_not_asked_for() -> None:
    assert from_query(pairs("gpu=rtx3060&nodes=1&interconnect=ib-ndr")) == Question()
    assert from_query(pairs("gpu=rtx3060&interconnect=ib-ndr")) == Question()


@pytest.mark.parametrize("name", ["/etc/passwd", "./9b", "..", "~/model.gguf", "config.json", "tests", "9b/../9b", ""])
def test_a_model_is_a_name_and_no_path(name: str) -> None:
    """Files that exist and files that do not get the same answer."""
    with pytest.raises((UnknownName, pydantic.ValidationError)) as caught:
        Question(model=name).request()
    if name:
        assert "no model of the catalog" in str(caught.value)


@pytest.mark.parametrize("name", ["card.yaml", "./card.yaml", "CARD.YML", "/etc/hostname", "a\\b"])
def test_a_device_is_a_name_and_no_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device file that is there is none here: it is refused in the words for one that is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.yaml").write_text("like: rtx3060\nname: mine\n")
    with pytest.raises(UnknownName, match="no device of the catalog is called"):
        Question(devices=(DeviceKeys(name=name),)).request()


@pytest.mark.parametrize("name", ["auto", "AUTO ", "2xrtx3090", "rtx3060,rtx3090", "rtx3061"])
def test_a_device_is_one_name(name: str) -> None:
    with pytest.raises(QwenfitError):
        Question(devices=(DeviceKeys(name=name),)).request()


def test_this_machine_only_where_it_was_allowed() -> None:
    asked = Question(devices=(DeviceKeys(name="auto"),))
    with pytest.raises(UnknownName, match="does not tell"):
        asked.request()
    assert asked.request(allow_auto=True).devices == ("auto",)


BEYOND = ["ctx=1e9", "ctx=-1", "ctx=0", "ctx=99M", "ctx=9999999999999999999", "seqs=0", "seqs=x", "mtp=17"]
BEYOND += ["gpu=a&n=0", "gpu=rtx3060&n=33", "&".join(["gpu=rtx3060"] * 9), f"model={'a' * 61}", "engine=\x00"]
BEYOND += ["weights=ä", "n=1&gpu=é", "nodes=0", "nodes=129", "nodes=two", "tp=0", "pp=1025", "dp=-1", "ep=1.5"]


@pytest.mark.parametrize("text", BEYOND)
def test_bounds(text: str) -> None:
    with pytest.raises((BadInput, pydantic.ValidationError)):
        from_query(pairs(text))


def test_many_rows_of_many() -> None:
    with pytest.raises(BadInput, match="64 devices: give at most 32"):
        Question(devices=(DeviceKeys(name="rtx3060", count=32),) * 2).request()


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Question,
        model=st.sampled_from(["9b", "Qwen/Qwen3.5-9B", "qwen3.5-35b-a3b"]),
        devices=st.lists(
            st.builds(DeviceKeys, name=st.sampled_from(["rtx3060", "m1-16gb"]), count=st.integers(1, 4)),
            min_size=1,
            max_size=8,
        ),
        ctx_tokens=st.integers(1, 10_000_000),
        seqs=st.integers(1, 1_000_000),
        engine=st.sampled_from([None, "vllm", "vllm@0.31"]),
        weights=st.sampled_from([None, "int4", "a b&c=d"]),
        kv_dtype=st.sampled_from([None, "q8_0/q4_0"]),
        mtp=st.integers(0, 16),
        vision=st.sampled_from([None, True]),
        tp=st.none() | st.integers(1, 1024),
        pp=st.none() | st.integers(1, 1024),
        dp=st.none() | st.integers(1, 1024),
        ep=st.none() | st.integers(1, 1024),
        nodes=st.integers(1, 128),
        interconnect=st.sampled_from([None, "8xib-ndr", "25GB/s"]),
    )
)
def test_a_link_comes_back_as_the_same_question(asked: Question) -> None:
    if asked.nodes == 1:
        asked = asked.model_copy(update={"interconnect": None})
    assert from_query(pairs(query(asked))) == asked


def test_the_slider() -> None:
    """From 1K to 1M, every step longer than the last by a sixteenth to an eighth, and every one can be typed."""
    assert CONTEXTS[0] == 1024 and CONTEXTS[-1] == 1 << 20 and 262144 in CONTEXTS
    assert all(1.06 < after / before < 1.13 for before, after in pairwise(CONTEXTS))
    for place, tokens in enumerate(CONTEXTS):
        assert slider_step(tokens) == place and parse_tokens(tokens_text(tokens)) == tokens
    assert (
        slider_step(1) == 0
        and slider_step(10_000_000) == len(CONTEXTS) - 1
        and slider_step(262145) == slider_step(262144)
    )
