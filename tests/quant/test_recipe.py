"""What a recipe file may say, what it may not, and which scheme every module gets by it."""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.profiles.errors import BadInput, QwenfitError, Unsupported
from qwenfit.quant.module_rules import fused_with
from qwenfit.quant.modules import Module, list_modules
from qwenfit.quant.quantized import Scheme
from qwenfit.quant.recipe import KEEP, LIMIT_BYTES, Recipe, Rule, first_rule, read_recipe, resolve
from qwenfit.quant.source import open_source

PARTS = {"lm_head": ("lm_head", None), "mtp.fc": ("mtp", None), "mtp.layers.0.mlp.up_proj": ("mtp", None)}
LEAVES = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj", "mlp.gate_proj", "mlp.up_proj")


def module(name: str, part: str = "layers", layer: int | None = 0, columns: int = 256) -> Module:
    return Module(name, f"{name}.weight", 64, columns, part, layer, name.partition("layers.0.")[2] or name)


MODULES = [
    *(module(f"model.layers.0.{leaf}") for leaf in LEAVES),
    module("model.layers.0.mlp.down_proj", columns=512),
    *(module(f"model.layers.3.self_attn.{leaf}_proj", layer=3) for leaf in "qkvo"),
    module("model.layers.0.mlp.shared_expert.up_proj", "shared_experts"),
    module("model.layers.0.mlp.experts.1.up_proj", "experts"),
    *(module(name, *part) for name, part in PARTS.items()),
]


def schemes_of(**changes: Any) -> dict[str, Scheme]:
    return resolve(Recipe(**{"symmetric": True, **changes}), MODULES)[0]


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_default_quantizes_layers_and_experts_only() -> None:
    found, kept = resolve(Recipe(symmetric=True), MODULES)
    assert set(kept) == {*PARTS, "model.layers.0.mlp.shared_expert.up_proj"}
    assert set(found.values()) == {Scheme(4, 128, True)} and len(found) + len(kept) == len(MODULES)


@pytest.mark.parametrize("symmetric", [True, False])
def test_symmetry_reaches_every_scheme_of_four_bits(symmetric: bool) -> None:
    """Eight bits are symmetric whatever the recipe says: that is what every format holds."""
    found = schemes_of(symmetric=symmetric, lm_head=8, mtp=4, modules=(Rule("out_proj", 8), Rule("o_proj", 4, 64)))
    assert {scheme.symmetric for scheme in found.values() if scheme.bits == 4} == {symmetric}
    assert {scheme.symmetric for scheme in found.values() if scheme.bits == 8} == {True}
    assert found["model.layers.3.self_attn.o_proj"] == Scheme(4, 64, symmetric)


def test_parts_have_bits_of_their_own() -> None:
    found = schemes_of(lm_head=8, mtp=4, shared_experts=8)
    assert found["lm_head"].bits == 8 and found["model.layers.0.mlp.shared_expert.up_proj"].bits == 8
    assert found["mtp.layers.0.mlp.up_proj"].bits == 4
    assert len(found) == len(MODULES) - 1


def test_what_joins_the_prediction_layer_to_the_model_stays() -> None:
    """SGLang builds mtp.fc without quantization (`models/qwen3_5_mtp.py`); llama.cpp reads it in any type. Who names it
    gets it."""
    assert "mtp.fc" not in schemes_of(mtp=4)
    assert schemes_of(mtp=4, format="gguf")["mtp.fc"].bits == 4
    assert schemes_of(modules=(Rule(r"mtp\.fc", 8),))["mtp.fc"].bits == 8


def test_activations_of_eight_bits_are_a_matter_of_eight_bit_weights() -> None:
    recipe = Recipe(activation_bits=8).completed(is_moe=False, columns=256)
    found, _ = resolve(recipe, MODULES)
    assert set(found.values()) == {Scheme(8, -1, True, 8)}
    mixed = resolve(Recipe(bits=8, activation_bits=8, symmetric=True, modules=(Rule("out_proj", 4),)), MODULES)[0]
    assert mixed["model.layers.0.linear_attn.out_proj"].activation_bits is None


def test_the_first_rule_that_matches_a_module_wins() -> None:
    rules = (Rule(r"down_proj$", 8, 64), Rule(r"layers\.0\.mlp", KEEP), Rule(r"proj", 4, 32))
    found, kept = resolve(Recipe(symmetric=True, modules=rules), MODULES)
    assert found["model.layers.0.mlp.down_proj"] == Scheme(8, 64, True)
    assert "model.layers.0.mlp.gate_proj" in kept and "model.layers.0.mlp.experts.1.up_proj" in kept
    assert found["model.layers.3.self_attn.o_proj"] == Scheme(4, 32, True)
    assert "mtp.layers.0.mlp.up_proj" in kept and "mtp.fc" in kept  # the prediction layers' names have numbers, too


@pytest.mark.parametrize("named", ["in_proj_qkv$", "in_proj_z$"])
@pytest.mark.parametrize("bits", [8, KEEP])
def test_a_rule_for_one_of_fused_modules_is_for_all(named: str, bits: int) -> None:
    found, kept = resolve(Recipe(symmetric=True, modules=(Rule(named, bits),)), MODULES)
    pair = [f"model.layers.0.linear_attn.in_proj_{part}" for part in ("qkv", "z")]
    assert set(pair) <= set(kept) if bits == KEEP else {found[name].bits for name in pair} == {bits}
    assert found["model.layers.0.linear_attn.out_proj"].bits == 4


patterns = st.sampled_from(
    [".", "mlp", "q_proj", "v_proj", "in_proj_z", r"layers\.3", "experts", "up_proj", "fc", "^x"]
)
some_rules = st.lists(
    st.builds(Rule, patterns, st.sampled_from([4, 8, KEEP]), st.sampled_from([None, 32, 128, -1])), max_size=4
)


@given(rules=some_rules, symmetric=st.booleans(), bits=st.sampled_from([4, 8]))
def test_whatever_the_rules_what_is_fused_has_one_scheme(rules: list[Rule], symmetric: bool, bits: int) -> None:
    recipe = Recipe(bits=bits, symmetric=symmetric or bits == 8, modules=tuple(rules))
    try:
        found, kept = resolve(recipe, MODULES)
    except BadInput as error:
        assert "nothing to quantize" in str(error)
        return
    assert set(found) | set(kept) == {one.name for one in MODULES} and not set(found) & set(kept)
    by_key: dict[str, set[Scheme | None]] = {}
    for one in MODULES:
        by_key.setdefault(fused_with(one.name), set()).add(found.get(one.name))
    assert all(len(schemes) == 1 for schemes in by_key.values())


def test_groups_that_do_not_fit_are_named_and_can_be_kept() -> None:
    odd = [*MODULES, module("model.layers.1.linear_attn.out_proj", layer=1, columns=96)]
    with pytest.raises(
        BadInput, match=r"layers\.1\.linear_attn\.out_proj: 96 columns .* groups of 128; choose another"
    ):
        resolve(Recipe(symmetric=True), odd)
    kept = resolve(Recipe(symmetric=True, modules=(Rule(r"layers\.1\.", KEEP),)), odd)[1]
    assert "model.layers.1.linear_attn.out_proj" in kept
    smaller = resolve(Recipe(symmetric=True, modules=(Rule(r"layers\.1\.", 4, 32),)), odd)[0]
    assert smaller["model.layers.1.linear_attn.out_proj"].group_size == 32


def test_a_recipe_that_keeps_everything_is_none() -> None:
    with pytest.raises(BadInput, match="nothing to quantize"):
        resolve(Recipe(symmetric=True, modules=(Rule("", KEEP),)), MODULES)


@pytest.mark.parametrize(
    ("changes", "is_moe", "method", "symmetric"),
    [
        ({}, False, "gptq", False),  # zero points load everywhere
        ({}, True, "gptq", True),  # but in experts
        ({"format": "gptq"}, False, "gptq", True),
        ({"format": "awq", "method": "awq"}, False, "awq", False),
        ({"symmetric": True}, False, "gptq", True),
        ({"symmetric": False}, True, "gptq", False),
        ({"bits": 8}, False, "rtn", True),
        ({"bits": 8, "method": "gptq"}, False, "gptq", True),
        ({"activation_bits": 8}, False, "rtn", True),
    ],
)
def test_what_is_left_open_follows_from_the_rest(
    changes: dict[str, Any], is_moe: bool, method: str, symmetric: bool
) -> None:
    whole = Recipe(**changes).completed(is_moe, 256)
    assert (whole.method, whole.symmetric) == (method, symmetric)
    assert whole.completed(is_moe, 256) == whole
    assert whole.needs_calibration == (method != "rtn")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "awq", "symmetric": True}, "asymmetric 4-bit"),
        ({"format": "awq", "bits": 8}, "asymmetric 4-bit"),
        ({"format": "gptq", "activation_bits": 8}, "W8A8 is for --format compressed-tensors"),
        ({"bits": 8, "symmetric": False}, "leave out --asym"),
    ],
)
def test_what_no_format_has(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        Recipe(**changes).completed(is_moe=False, columns=256)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3},
        {"bits": True},
        {"group_size": 16},
        {"group_size": 0},
        {"method": "autoround"},
        {"format": "exl2"},
        {"activation_bits": 4},
        {"lm_head": 2},
        {"mtp": True},
        {"tokens": 0},
        {"tokens": 2.0},
        {"sequence_tokens": (1 << 24) + 1},
        {"damping": 0.0},
        {"damping": 1.0},
        {"damping": math.nan},
        {"modules": (Rule("x", 3),)},
        {"modules": (Rule("x", True),)},
        {"modules": (Rule("x", 4, 48),)},
    ],
    ids=str,
)
def test_values_that_are_none(changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=rf"{next(iter(changes)).replace('modules', 'rule')}"):
        Recipe(**changes)


def test_a_file_says_what_the_options_say_and_more(tmp_path: Path) -> None:
    text = """
bits: 8
group_size: -1
symmetric: true
method: gptq
damping: 0.05
full_precision_targets: true
modules:
  - {match: 'out_proj$', bits: 4, group_size: 32}
  - match: lm_head
    bits: 16
"""
    base = Recipe(bits=4, tokens=99, seed=3)
    found = read_recipe(written(tmp_path, text), base)
    rules = (Rule("out_proj$", 4, 32), Rule("lm_head", 16))
    assert found == Recipe(
        bits=8,
        group_size=-1,
        symmetric=True,
        method="gptq",
        damping=0.05,
        full_precision_targets=True,
        tokens=99,  # what the file does not say is as the options have it
        seed=3,
        modules=rules,
    )


@pytest.mark.parametrize(
    ("changes", "is_moe", "columns", "expected"),
    [
        ({}, False, 9216, True),  # 4B
        ({}, False, 12288, False),  # 9B: a layer would take more than 3 CPU-minutes
        ({}, True, 2048, False),
        ({"format": "gguf"}, False, 9216, True),
        ({"format": "gguf"}, False, 12288, False),
        ({"bits": 8}, False, 256, False),
        ({"method": "awq"}, False, 256, False),
        ({"full_precision_targets": False}, False, 256, False),
        ({"full_precision_targets": True}, True, 12288, True),
    ],
)
def test_gptq_of_narrow_dense_models_has_full_precision_targets(
    changes: dict[str, Any], is_moe: bool, columns: int, expected: bool
) -> None:
    assert Recipe(**changes).completed(is_moe, columns).full_precision_targets is expected


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
def test_full_precision_targets_are_for_gptq(form: str) -> None:
    with pytest.raises(Unsupported, match="leave out --gptaq, or --method rtn"):
        Recipe(full_precision_targets=True, method="rtn", format=form).completed(is_moe=False, columns=256)


@pytest.mark.parametrize("is_moe", [True, False])
def test_a_resolved_recipe_reads_back_as_itself(is_moe: bool, tmp_path: Path) -> None:
    whole = Recipe(seed=7, lm_head=8, modules=(Rule(r"a\.b'\"#: |", 8, 64), Rule("ü", 16))).completed(is_moe, 256)
    assert read_recipe(written(tmp_path, whole.text()), Recipe()) == whole


BAD = {
    "nothing": ("", "list of `name: value`"),
    "a list": ("- bits: 4", "list of `name: value`"),
    "a number": ("4", "list of `name: value`"),
    "no YAML": ("bits: [4", "is no YAML"),
    "tabs": ("bits:\t4\n\tmethod: gptq", "is no YAML"),
    "two documents": ("bits: 4\n---\nbits: 8", "is no YAML"),
    "an object": ("bits: !!python/object/apply:os.system ['true']", "is no YAML"),
    "control characters": ("bits: 4\x00", "is no YAML"),
    "an unknown key": ("bit: 4", "'bit' is not one of bits, group_size"),
    "a key that is no text": ("4: 4", "4 is not one of"),
    "a long key": (f"{'k' * 900}: 4", r"'k{56}\.\.\. is not one of"),
    "bits in words": ("bits: four", "bits is 'four'"),
    "bits in quotes": ("bits: '4'", "bits is '4'"),
    "a fraction": ("bits: 4.0", "bits is 4.0"),
    "wrong bits": ("bits: 3", "bits is 3"),
    "yes": ("bits: yes", "bits is True"),
    "no bits": ("bits:", "bits is None"),
    "symmetric by number": ("symmetric: 1", "symmetric is 1"),
    "targets by number": ("full_precision_targets: 1", "full_precision_targets is 1"),
    "a flag as seed": ("seed: true", "seed is True"),
    "a list of methods": ("method: [gptq]", "method is"),
    "rules that are one": ("modules: {match: x, bits: 4}", "modules is a list"),
    "too many rules": ("modules:\n" + "- {match: x, bits: 4}\n" * 1001, "at most 1,000"),
    "a rule in words": ("modules: [out_proj]", "a rule is"),
    "a rule without bits": ("modules: [{match: x}]", "a rule is"),
    "a rule with more": ("modules: [{match: x, bits: 4, method: rtn}]", "a rule is"),
    "a rule of 5 bits": ("modules: [{match: x, bits: 5}]", "bits of a rule is 5"),
    "a group of a rule": ("modules: [{match: x, bits: 4, group_size: 100}]", "group_size of a rule is 100"),
    "no regular expression": ("modules: [{match: '(', bits: 4}]", "is no regular expression"),
    "a number to match": ("modules: [{match: 4, bits: 4}]", "is no regular expression"),
    "a long expression": (f"modules: [{{match: {'x' * 1001}, bits: 4}}]", "is no regular expression"),
    "deep lists": ("bits: " + "[" * 1500, "is no YAML"),
    "deep closed lists": ("bits: " + "[" * 1000 + "]" * 1000, "is no YAML"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence_that_names_it(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    path = written(tmp_path, text)
    with pytest.raises(QwenfitError, match=words) as caught:
        read_recipe(path, Recipe())
    said = str(caught.value)
    assert said.startswith(path) and "\n" not in said and len(said) < len(path) + 500


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.yaml cannot be read"):
        read_recipe(str(tmp_path / "none.yaml"), Recipe())
    with pytest.raises(BadInput, match="cannot be read"):
        read_recipe(str(tmp_path), Recipe())
    (tmp_path / "binary.yaml").write_bytes(b"bits: \xff\xfe")
    with pytest.raises(BadInput, match=r"binary\.yaml is no YAML"):
        read_recipe(str(tmp_path / "binary.yaml"), Recipe())
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(10 * LIMIT_BYTES)
    with pytest.raises(BadInput, match=r"large\.yaml has more than 65,536 bytes"):
        read_recipe(str(tmp_path / "large.yaml"), Recipe())


@settings(max_examples=40)
@given(text=st.text(max_size=60))
def test_no_text_is_a_traceback(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    with suppress(QwenfitError):
        read_recipe(str(path), Recipe())


def test_a_recipe_for_a_real_checkpoint(checkpoint: Callable[..., Path]) -> None:
    """All modules of both classes have an answer, and the mixture's experts one scheme per layer."""
    for name in ("qwen3_5", "qwen3_5_moe"):
        modules = list_modules(open_source(str(checkpoint(name))))
        recipe = Recipe(group_size=32, modules=(Rule(r"layers\.1\.mlp\.experts\.0\.", 8),)).completed(
            "moe" in name, 256
        )
        found, kept = resolve(recipe, modules)
        assert len(found) + len(kept) == len(modules)
        experts = {found[one.name].bits for one in modules if one.part == "experts" and one.layer == 1}
        assert experts == ({8} if "moe" in name else set())


@pytest.mark.parametrize("line", ["bits: 4.0", "bits: 4, group_size: 32.0"])
def test_a_rule_with_a_fraction_is_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(BadInput, match="of a rule is"):
        read_recipe(written(tmp_path, f"modules: [{{match: x, {line}}}]"), Recipe())


def test_numbers_and_nests_that_are_meant_to_hurt_are_refused_at_once(tmp_path: Path) -> None:
    """5,000 digits are more than Python turns into an int; six levels of aliases are a million numbers."""
    with pytest.raises(BadInput, match="is no YAML"):
        read_recipe(written(tmp_path, f"seed: {'9' * 5000}"), Recipe())
    nest = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcde", "bcdef", strict=True)
    )
    with pytest.raises(BadInput, match="'a' is not one of"):
        read_recipe(written(tmp_path, nest), Recipe())
    with pytest.raises(BadInput, match="bits is a list of 10"):
        read_recipe(written(tmp_path, "bits: &a [1,1,1,1,1,1,1,1,1,1]"), Recipe())


def test_the_first_rule_of_the_file_wins_whichever_fused_module_it_names(checkpoint: Callable[..., Path]) -> None:
    modules = list_modules(open_source(str(checkpoint("qwen3_5"))))
    rules = (Rule(r"\.0\.linear_attn\.in_proj_z$", 8), Rule(r"\.0\.linear_attn\.in_proj_qkv$", 16))
    for order, bits in ((rules, 8), (rules[::-1], None)):
        schemes, _ = resolve(Recipe(group_size=32, modules=order).completed(False, 256), modules)
        found = {
            name.rpartition(".")[2]: scheme.bits for name, scheme in schemes.items() if ".0.linear_attn.in" in name
        }
        assert found == ({} if bits is None else {"in_proj_qkv": bits, "in_proj_z": bits})


def test_the_prediction_layer_is_meant_only_where_it_is_named() -> None:
    rules = (Rule(r"layers\.0\.mlp", 8),)
    assert first_rule(rules, "model.layers.0.mlp.up_proj") == rules[0]
    assert first_rule(rules, "mtp.layers.0.mlp.up_proj") is None
    named = (Rule(r"^mtp\.layers\.0\.mlp", 8),)
    assert first_rule(named, "mtp.layers.0.mlp.up_proj") == named[0]
