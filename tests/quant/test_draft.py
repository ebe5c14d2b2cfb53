"""A draft is, to whoever reads headers, the checkpoint that comes of it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qwenfit.planner import Request, plan
from qwenfit.profiles.model_catalog import model
from qwenfit.quant import Recipe, Rule, quantize
from qwenfit.quant.draft import drafted
from qwenfit.quant.layout import lay_out
from qwenfit.quant.source import open_source

RULES = (Rule(r"\.0\.mlp\.", 8), Rule(r"\.1\.mlp\.", 16))


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "gguf"])
def test_the_plan_of_a_draft_is_that_of_the_result(
    checkpoint: Callable[..., Path], tmp_path: Path, name: str, form: str
) -> None:
    if form == "gguf":
        pytest.importorskip("gguf", reason="GGUF files are written with it: pip install gguf")
    folder = str(checkpoint(name, is_wide=True))
    recipe = Recipe(format=form, method="rtn", group_size=32, modules=RULES)
    quantize(folder, str(tmp_path / "made"), recipe)
    made = tmp_path / "made" / "made.gguf" if form == "gguf" else tmp_path / "made"
    request = Request(devices=("rtx3060",), ctx_tokens=4096)
    with drafted(lay_out(open_source(folder), recipe).result) as path:
        draft = model(path)
        planned = plan(Request(model=path, devices=request.devices, ctx_tokens=4096)).best.allocation
    read = model(str(made))
    assert str(draft.tensors) == str(read.tensors) and draft.checkpoint_bytes == read.checkpoint_bytes
    found = plan(Request(model=str(made), devices=request.devices, ctx_tokens=4096)).best.allocation
    assert str([share.memory for share in found.devices]) == str([share.memory for share in planned.devices])
    assert not Path(path).exists()
