"""`--fit`: as much at 8 bits as fits, what gains most first, and the plan of the result met to the byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenfit.profiles.errors import BadInput, Unsupported
from qwenfit.profiles.model_catalog import model
from qwenfit.quant import Recipe, Rule, quantize
from qwenfit.quant import fit as fit_module
from qwenfit.quant.fit import Goal, fit, plan_of
from qwenfit.quant.layout import lay_out
from qwenfit.quant.module_rules import fused_with
from qwenfit.quant.sensitivity import Sensitivity
from qwenfit.quant.shards import Entry, draft_shards
from qwenfit.quant.source import open_source

DATA = Path(__file__).parent.parent / "data"
SMALL = Recipe(group_size=32, tokens=512, sequence_tokens=128)


@pytest.fixture(scope="module")
def empty_9b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Qwen3.5-9B with holes for weights: real shapes, no data."""
    folder = tmp_path_factory.mktemp("9b")
    draft_shards(str(folder), [Entry(name, t.dtype, tuple(t.shape)) for name, t in model("qwen3.5-9b").expanded()])
    configs = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(configs["models"]["qwen3.5-9b"]))
    shutil.copy(DATA / "small_hybrid" / "tokenizer.json", folder)
    return str(folder)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensitivities that a hash decides, in place of measured ones."""

    def measure(source: Any, layout: Any, *rest: Any) -> list[Sensitivity]:
        groups: dict[str, list[Any]] = {}
        for module in layout.modules:
            if module.layer is not None:
                groups.setdefault(fused_with(module.name), []).append(module)
        return [
            Sensitivity(
                tuple(module.name for module in group),
                (1 + number * 7919 % 101) * 1e-5,
                sum(module.rows * module.columns for module in group),
            )
            for number, group in enumerate(groups.values())
        ]

    monkeypatch.setattr(fit_module, "_sensitivities", measure)


@pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
@pytest.mark.usefixtures("made_up")
def test_real_shapes_on_a_real_card(empty_9b: str, form: str) -> None:
    """9B on an RTX 3060 at 128K: more than nothing and less than everything at 8 bits, and no group more fits."""
    if form == "gguf":
        pytest.importorskip("gguf", reason="GGUF files are written with it: pip install gguf")
    recipe = Recipe(format="gguf", embeddings=6, lm_head=6) if form == "gguf" else Recipe(format=form)
    fitted = fit(empty_9b, recipe, Goal("rtx3060", 131072))
    assert fitted.recipe and fitted.plan.fits and fitted.spare_bytes >= 0
    assert 0 < len(fitted.raised) < len(fitted.sensitivities) == 128
    gains = [group.error / group.weights for group in fitted.sensitivities]
    assert gains == sorted(gains, reverse=True)
    first_out = next(group for group in fitted.sensitivities if group not in fitted.raised)
    more = fit_module.raised(fitted.recipe, [first_out])
    layout = lay_out(open_source(empty_9b), more)
    goal = Goal("rtx3060", 131072, 1, fitted.plan.engine, fitted.plan.kv_dtype)
    worse = fit_module._planned(layout, goal)
    assert not worse.fits or worse.tight


@pytest.mark.usefixtures("made_up")
def test_where_nothing_fits_there_is_no_recipe_and_advice(empty_9b: str) -> None:
    fitted = fit(empty_9b, Recipe(), Goal("rtx4060", 131072))
    assert fitted.recipe is None and fitted.spare_bytes < 0 and fitted.advice and not fitted.plan.fits


@pytest.mark.usefixtures("made_up")
def test_what_the_user_ruled_is_left_alone(empty_9b: str) -> None:
    recipe = Recipe(modules=(Rule(r"\.mlp\.", 4),))
    fitted = fit(empty_9b, recipe, Goal("rtx3090", 32768))
    assert fitted.recipe and fitted.recipe.modules[0] == recipe.modules[0]


def test_the_result_is_what_was_planned(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """From measured sensitivities to the finished folder, on a device made so that about half of the groups fit."""
    folder = str(checkpoint("qwen3_5", is_wide=True))
    device = tmp_path / "small.yaml"

    def write_device(usable_bytes: int) -> None:
        entry = {"name": "small", "like": "rtx3060", "usable_bytes": usable_bytes}
        device.write_text(yaml.safe_dump(entry))

    def at(usable_bytes: int) -> Any:
        write_device(usable_bytes)
        return fit(folder, SMALL, Goal(str(device), 4096, engine="vllm"), memory=str(tmp_path / "known.json"))

    low, high = 1 << 28, 8 << 30  # nothing fits; everything does
    assert at(low).recipe is None and len(at(high).raised) == len(at(high).sensitivities) == 16
    for _ in range(24):
        middle = (low + high) // 2
        fitted = at(middle)
        if fitted.recipe is None or not fitted.raised:
            low = middle
        elif len(fitted.raised) == 16:
            high = middle
        else:
            break
    else:
        pytest.fail("no device lets some groups in and not others")
    assert fitted.recipe and fitted.recipe.symmetric
    summary = quantize(folder, str(tmp_path / "made"), fitted.recipe)
    raised = {name for group in fitted.raised for name in group.modules}
    assert {one.module for one in summary.results if one.bits == 8} == raised
    found, planned = plan_of(str(tmp_path / "made"), fitted).allocation, fitted.plan.allocation
    assert str([share.memory for share in found.devices]) == str([share.memory for share in planned.devices])


def test_sensitivities_are_measured_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, memory = str(checkpoint("qwen3_5")), tmp_path / "known.json"
    seen: list[int] = []

    def run(recipe: Recipe) -> Any:
        return fit(
            folder, recipe, Goal("rtx3060", 4096), memory=str(memory), watch=lambda layer, layers: seen.append(layer)
        )

    first = run(SMALL)
    assert seen == [1, 2, 3, 4] and run(SMALL).sensitivities == first.sensitivities and seen == [1, 2, 3, 4]
    run(Recipe(group_size=64, tokens=512, sequence_tokens=128))
    assert seen == [1, 2, 3, 4] * 2
    memory.write_text('{"identity": 1')
    with pytest.raises(BadInput, match=r"known\.json"):
        run(SMALL)


@pytest.mark.parametrize(
    "changes", [{"bits": 8}, {"activation_bits": 8}, {"format": "awq"}, {"method": "awq"}], ids=lambda c: str(c)
)
def test_what_cannot_be_mixed_is_refused(checkpoint: Callable[..., Path], changes: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match="--fit"):
        fit(str(checkpoint("qwen3_5")), Recipe(**{"group_size": 32, **changes}), Goal("rtx3060"))
