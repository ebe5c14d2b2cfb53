"""The model card: front matter that a YAML reader takes, and every fact that it was given."""

from typing import Any

import yaml

from qwenfit.quant.card import Card, model_card

FACTS: dict[str, Any] = {
    "name": "Qwen3.5-9B-int4",
    "format": "compressed-tensors",
    "method": "gptq",
    "command": "qwen-quant Qwen/Qwen3.5-9B --bits 4",
    "versions": {"qwenfit": "0.1.0", "torch": "2.13.0"},
    "seed": 7,
    "recipe": "bits: 4\nkeep: [lm_head]\n",
    "calibration": "8192 tokens of the text that ships with qwenfit",
    "source_fingerprint": "ab" * 32,
    "bytes": 9_050_000_000,
    "source_bytes": 19_306_216_416,
    "bits_per_weight": 7.5,
    "base_model": "Qwen/Qwen3.5-9B",
    "license": "apache-2.0",
    "has_vision": True,
    "tags": ["int4"],
    "measurements": {"mean KL": 0.01234567, "tokens": 8192},
    "errors": {f"layers.{n}.mlp.up_proj": n / 100 for n in range(20)},
    "fallbacks": ["layers.3.mlp.experts.7"],
}


def front(text: str) -> dict[str, Any]:
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_every_fact_is_there() -> None:
    text = model_card(Card(**FACTS))
    assert text == model_card(Card(**FACTS))
    for fact in (
        "--bits 4",
        "torch 2.13.0",
        "seed: 7",
        "keep: [lm_head]",
        "8192 tokens of",
        "abab",
        "0.01235",
        "9.050 GB",
    ):
        assert fact in text, fact
    assert "47% of the original (19.306 GB)" in text and "experts.7" in text
    assert text.index("layers.19.") < text.index("layers.18.") and "layers.9." not in text  # the ten worst


def test_front_matter_is_what_the_hub_reads() -> None:
    assert front(model_card(Card(**FACTS))) == {
        "base_model": "Qwen/Qwen3.5-9B",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "tags": ["qwen3.5", "quantized", "compressed-tensors", "int4"],
    }
    plain = front(model_card(Card(**{**FACTS, "base_model": None, "license": None, "format": "gguf"})))
    assert plain["library_name"] == "gguf" and plain["pipeline_tag"] == "text-generation"
    assert "base_model" not in plain and "license" not in plain


def test_what_was_not_measured_is_not_said() -> None:
    text = model_card(Card(**{**FACTS, "measurements": {}, "errors": {}, "fallbacks": ()}))
    assert "## Measured" not in text and "## Errors" not in text and "never reached" not in text


def test_words_from_outside_stay_inside_their_place() -> None:
    """Names, commands and recipes are other people's: no new heading, cell, fence or field comes of them."""
    evil = "x`\n# heading | cell\n```\n---\ninjected: true"
    text = model_card(Card(**{**FACTS, "name": evil, "command": evil, "errors": {evil: 0.5}, "base_model": evil}))
    assert front(text)["base_model"] == evil and "injected" not in front(text)
    fence = "````sh\n" + evil
    assert fence in text
    rest = text.replace(fence, "")
    assert "\n# heading" not in rest.split("---\n", 2)[2] and "heading \\| cell" in rest
