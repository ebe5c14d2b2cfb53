"""The matrices of a checkpoint that a recipe may quantize: names, shapes and parts as the releases have them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from qwenfit.profiles.errors import Unsupported
from qwenfit.quant.modules import EXPERT_LEAVES, STAGES, Module, list_modules
from qwenfit.quant.source import open_source

LINEAR = ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj")
FULL = tuple(f"self_attn.{name}_proj" for name in "qkvo")
DENSE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Headers:
    """As much of a `Source` as listing needs: names and shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.shapes = {name.replace("__", "."): shape for name, shape in shapes.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


def listed(shapes: dict[str, tuple[int, ...]]) -> list[Module]:
    return list_modules(Headers(**shapes))  # pyright: ignore[reportArgumentType]


def of_part(modules: list[Module], part: str) -> list[Module]:
    return [module for module in modules if module.part == part]


def test_a_dense_checkpoint(checkpoint: Callable[..., Path]) -> None:
    """Four layers, the last one of full attention: 3 x 6 + 7 matrices, and the prediction layer's 7 and its fc."""
    source = open_source(str(checkpoint("qwen3_5")))
    modules = list_modules(source)
    layers = of_part(modules, "layers")
    assert Counter(module.layer for module in layers) == {0: 6, 1: 6, 2: 6, 3: 7}
    assert {module.leaf for module in layers if module.layer == 0} == {*LINEAR, *DENSE}
    assert {module.leaf for module in layers if module.layer == 3} == {*FULL, *DENSE}
    mtp = of_part(modules, "mtp")
    assert {module.leaf for module in mtp} == {*FULL, *DENSE, "fc"} and {module.layer for module in mtp} == {None}
    for module in modules:
        assert source.shape(module.tensor) == (module.rows, module.columns), module
        assert module.tensor == f"{module.name}.weight" and module.expert is None and module.first_row == 0


def test_what_no_recipe_may_touch(checkpoint: Callable[..., Path]) -> None:
    """State, gates, routers, convolutions and norms: rounding in_proj_a or b ruins a DeltaNet layer."""
    for name in ("qwen3_5", "qwen3_5_moe"):
        for module in list_modules(open_source(str(checkpoint(name)))):
            for word in ("in_proj_a", "in_proj_b", "conv1d", "norm", "A_log", "dt_bias", "shared_expert_gate"):
                assert word not in module.name, module
            assert not module.name.endswith("mlp.gate"), module


def test_stacks_of_experts_are_matrices_one_by_one(checkpoint: Callable[..., Path]) -> None:
    """Gate is the first half of a stack's rows; together they are the stack, without a row left out or twice."""
    source = open_source(str(checkpoint("qwen3_5_moe")))
    modules = of_part(list_modules(source), "experts")
    stacks = {module.tensor for module in modules}
    assert stacks and {len(source.shape(name)) for name in stacks} == {3}
    for name in stacks:
        count, rows, columns = source.shape(name)
        covered = Counter(
            (module.expert, row)
            for module in modules
            if module.tensor == name
            for row in range(module.first_row, module.first_row + module.rows)
        )
        assert covered == {(expert, row): 1 for expert in range(count) for row in range(rows)}, name
        assert {module.columns for module in modules if module.tensor == name} == {columns}
    gate, up = (next(one for one in modules if one.leaf == f"mlp.experts.1.{leaf}") for leaf in EXPERT_LEAVES[:2])
    assert gate.first_row == 0 and up.first_row == gate.rows == up.rows and gate.expert == up.expert == 1
    shared = of_part(list_modules(source), "shared_experts")
    assert {module.leaf.rpartition(".")[2] for module in shared} == set(EXPERT_LEAVES)


def test_names_of_every_release() -> None:
    """With and without the vision class's prefix; experts one by one, as quantized and converted folders have them."""
    modules = listed(
        {
            "model.language_model.layers.10.mlp.experts.12.up_proj.weight": (8, 16),
            "model.layers.1.self_attn.q_proj.weight": (8, 16),
            "layers.2.mlp.down_proj.weight": (16, 8),
            "mtp.layers.0.mlp.experts.3.down_proj.weight": (16, 8),
            "mtp.fc.weight": (16, 32),
            "lm_head.weight": (64, 16),
        }
    )
    assert [(module.part, module.layer, module.leaf, module.expert) for module in modules] == [
        ("experts", 10, "mlp.experts.12.up_proj", 12),
        ("layers", 1, "self_attn.q_proj", None),
        ("layers", 2, "mlp.down_proj", None),
        ("mtp", None, "mlp.experts.3.down_proj", 3),
        ("mtp", None, "fc", None),
        ("lm_head", None, "lm_head", None),
    ]


def test_the_vision_tower_is_not_listed() -> None:
    """Its blocks have the leaves of a text layer's, and numbers too."""
    assert not listed(
        {
            "model.visual.layers.0.self_attn.q_proj.weight": (8, 8),
            "model.visual.blocks.0.mlp.up_proj.weight": (8, 8),
            "model.visual.merger.mlp.0.weight": (8, 8),
        }
    )


@pytest.mark.parametrize(
    ("leaf", "shape"), [("gate_up_proj", (4, 7, 16)), ("gate_up_proj", (8, 16)), ("down_proj", (8, 16))]
)
def test_a_stack_of_another_shape(leaf: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(Unsupported, match=rf"experts\.{leaf} is \[.*three dimensions"):
        listed({f"model.layers.0.mlp.experts.{leaf}": shape})


def test_a_stage_names_each_leaf_once() -> None:
    leaves = [leaf for stage in STAGES.values() for leaf in stage]
    assert len(leaves) == len(set(leaves)) and set(LINEAR + FULL + DENSE) <= set(leaves)
