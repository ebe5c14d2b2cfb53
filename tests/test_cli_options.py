"""One table of options, two readers: the plain one and Typer's must mean the same."""

from typing import Any

import pytest
import typer.main
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.cli.app import build
from qwenfit.cli.options import BY_FLAG, OPTIONS, Values, asked, parse_bytes, parse_fraction, read
from qwenfit.planner.request import Options, Prices, Request
from qwenfit.profiles.errors import BadInput

TEXTS = st.one_of(
    st.sampled_from(
        ["rtx3060", "262144", "256K", "256k", "1", "0", "-1", "9b", "vllm@0.31", "32GiB", "0.9", "json", ""]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)


@st.composite
def argument_lists(draw: st.DrawFn) -> list[str]:
    """Options of the table in any order and number, each with a value of any kind, in both spellings."""
    arguments: list[str] = []
    for option in draw(st.lists(st.sampled_from(OPTIONS), max_size=8)):
        flag = draw(st.sampled_from(option.flags + option.off))
        if option.metavar is None:
            arguments.append(flag)
        elif draw(st.booleans()):
            arguments.append(f"{flag}={draw(TEXTS)}")
        else:
            arguments += [flag, draw(TEXTS)]
    return arguments


CAPTURED: list[Values] = []
COMMAND = typer.main.get_command(build(lambda values: CAPTURED.append(values) or 0))


def typers_reading(arguments: list[str]) -> Values:
    CAPTURED.clear()
    assert COMMAND.main(args=arguments, prog_name="qwen-plan", standalone_mode=False) == 0
    (values,) = CAPTURED
    return values


def outcome(values: Values) -> object:
    try:
        return asked(values)
    except BadInput as refused:
        return str(refused)


@settings(max_examples=150, deadline=None)
@given(argument_lists())
def test_both_roads_give_the_same_request(arguments: list[str]) -> None:
    plain = read(arguments)
    if plain is None:  # only where a value could be taken for an option
        assert any(word.startswith("-") and word not in BY_FLAG and "=" not in word for word in arguments)
        return
    slow = typers_reading(arguments)
    assert slow == plain
    assert outcome(slow) == outcome(plain)


@pytest.mark.parametrize(
    "arguments",
    ["-h", "--help", "--version", "devices", "--gpus x", "--gpu", "--json=1", "--ctx -1", "rtx3060", "--", "-", "--=x"],
)
def test_what_is_not_plain_goes_to_typer(arguments: str) -> None:
    assert read(arguments.split()) is None


def test_everything_reaches_the_request() -> None:
    line = (
        "--model 27b --gpu 2xrtx3090 --ctx 256K --seqs 4 --engine vllm@0.31 --weights int4 --kv-dtype fp8 "
        "--state-dtype bfloat16 --mtp 2 --text-only --tp 2 --pp 1 --nodes 2 --interconnect ib-ndr --dp 1 --ep 1 "
        "--gpu-memory-utilization 0.9 "
        "--max-num-batched-tokens 2K --ubatch 256 --image-tokens 4096 --host-ram 32GiB --no-offload-experts "
        "--no-prefix-caching --no-cuda-graphs --usd-per-kwh 0.30 --device-usd 1400 --years 2 --device-watts 600 "
        "--api-usd-per-million 2.5 --job-tokens 78000000 --format markdown"
    )
    values = read(line.split())
    assert values is not None and len(values) == len(OPTIONS) - 2  # --json is --format json; --calibration needs a file
    question = asked(values)
    assert question.request == Request(
        model="27b",
        devices=("2xrtx3090",),
        ctx_tokens=262_144,
        seqs=4,
        engine="vllm@0.31",
        weights="int4",
        kv_dtype="fp8",
        state_dtype="bfloat16",
        mtp=2,
        vision=False,
        tp=2,
        pp=1,
        nodes=2,
        dp=1,
        ep=1,
        interconnect="ib-ndr",
        options=Options(0.9, 2048, 256, False, False, 4096, False, 32 << 30),
        prices=Prices(0.30, 1400, 2, 2.5, 78_000_000, 600),
    )
    assert question.format == "markdown" and not question.notes


def test_nothing_given_asks_for_this_machine() -> None:
    assert asked({}).request == Request(devices=("auto",))
    assert asked({}).format == "table"


def test_engines_are_named_in_any_case() -> None:
    """As devices, models and formats are."""
    assert [asked({"engine": text}).request.engine for text in ("vLLM@0.31.0", "LLAMA.CPP")] == [
        "vllm@0.31.0",
        "llama.cpp",
    ]


def test_small_k_is_noted() -> None:
    (note,) = asked({"ctx_tokens": "256k"}).notes
    assert note.startswith("--ctx 256k is 256,000 tokens")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ctx_tokens": "12 parsecs"}, "--ctx"),
        ({"ctx_tokens": ""}, "--ctx"),
        ({"seqs": "two"}, "--seqs"),
        ({"engine": "vllm@"}, "--engine"),
        ({"mtp": "-1"}, "--mtp"),
        ({"tp": "٣"}, "--tp"),
        ({"gpu_memory_utilization": "90"}, "--gpu-memory-utilization"),
        ({"host_memory_bytes": "32"}, "--host-ram"),
        ({"format": "yaml"}, "--format"),
        ({"model": " "}, "--model"),
        ({"json": True, "format": "table"}, "--json and --format table"),
    ],
)
def test_refusals_name_the_option(values: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInput) as refused:
        asked(values)
    assert str(refused.value).startswith(named)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "amount_bytes"),
    [("32GiB", 32 << 30), ("32 gib", 32 << 30), ("64GB", 64 * 10**9), ("1.5TiB", 3 << 39), ("5B", 5)],
)
def test_amounts_of_memory(text: str, amount_bytes: int) -> None:
    assert parse_bytes(text) == amount_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "32", "1.GiB", ".5GiB", "1 2GiB", "1..2GiB", "٣GiB", "9" * 99 + "B"]
)
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(BadInput):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "0", "0.0", "1.01", "nan", "inf", "1e-3", "-0.5", "90%", "٠.٥", "1."])
def test_no_shares(text: str) -> None:
    with pytest.raises(BadInput):
        parse_fraction(text)


def test_flags_are_said_once() -> None:
    flags = [flag for option in OPTIONS for flag in option.flags + option.off]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("text", "tokens"), [("4096", 4096), ("4K", 4096), ("1920x1080", 2040), ("1920X1080", 2040), ("3840x2160", 8160)]
)
def test_an_image_is_given_in_tokens_or_in_pixels(text: str, tokens: int) -> None:
    assert asked({"image_tokens": text}).request.options.image_tokens == tokens


@pytest.mark.parametrize("text", ["1920x", "x1080", "0x0", "1920 x 1080", "-1x5", "1x1000"])
def test_an_image_without_a_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        asked({"image_tokens": text})
