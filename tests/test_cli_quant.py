"""`qwen-quant` as a person or a job calls it: pages, JSON, exit status, one sentence for whatever is wrong."""

import importlib.util
import json
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the quantizer needs torch: pip install 'qwenfit[quant]'")

from qwenfit.cli import quant
from qwenfit.cli.quant_page import ProgressLine, duration, size
from qwenfit.quant.recorder import Progress

FAST = ("--group-size", "32", "--tokens", "128")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the quantizer's own tests."""
    place = Path(__file__).parent / "quant" / "conftest.py"
    spec = importlib.util.spec_from_file_location("quant_checkpoints", place)
    assert spec and spec.loader
    checkpoints = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checkpoints)
    folder = tmp_path_factory.mktemp("source") / "Small"
    folder.mkdir()
    checkpoints.write_checkpoint(folder, "qwen3_5", {})
    return folder


@pytest.fixture
def here(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one's own with the source in it."""
    shutil.copytree(source, tmp_path / "Small")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_checkpoint_its_inspection_and_its_evaluation(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quant.main(["Small", *FAST]) == 0
    page, progress = capsys.readouterr()
    assert "Small-int4" in page and "bits per weight  4.6" in page and "peak memory" in page
    assert progress.startswith("layer 1/4")
    assert quant.main(["inspect", "Small-int4"]) == 0
    page = capsys.readouterr().out
    assert "model.layers.3.self_attn.q_proj" in page and "pack-quantized" in page
    assert quant.main(["eval", "Small-int4", "--reference", "Small", "--tokens", "128", "--sequence", "64"]) == 0
    page = capsys.readouterr().out
    assert "KL, mean" in page and page.count("#") > 4
    words = ["eval", "Small-int4", "--reference", "Small", "--tokens", "128", "--sequence", "64", "--json"]
    assert quant.main([*words, "--max-kl", "1e-9"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and 0 < found["mean_kl"] < 1 and len(found["layer_errors"]) == 4


def test_a_group_size_that_a_gguf_type_does_not_take_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["Small", "--format", "gguf", "--gguf-type", "q8_0", "--dry-run"]
    assert quant.main([*words, "--group-size", "64"]) == 0
    page, said = capsys.readouterr()
    assert "q8_0 file has groups of its own, so --group-size 64 changes nothing" in said
    assert quant.main(words) == 0
    assert capsys.readouterr() == (page, "")


def test_eval_draws_a_bar_per_layer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="it draws: pip install matplotlib")
    assert quant.main(["Small", "out", "--bits", "8", "--group-size", "32"]) == 0
    words = ["eval", "out", "--reference", "Small", "--tokens", "64", "--sequence", "32", "--plot"]
    assert quant.main([*words, "errors.svg"]) == 0
    drawn = (here / "errors.svg").read_text()
    assert [f"layer-{number}" in drawn for number in range(5)] == [True] * 4 + [False]
    assert quant.main([*words, "errors.doc"]) == 2
    assert "ends in .svg, .png, .pdf" in capsys.readouterr().err


def test_json_says_what_was_made(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quant.main(["Small", "there", "--bits", "8", "--group-size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and found["recipe"]["method"] == "rtn" and found["peak_memory_bytes"] > 1e7
    files = sum(path.stat().st_size for path in (here / "there").glob("*.safetensors"))
    assert 0 < files - found["bytes"] < 100_000  # headers


def test_dry_run_is_the_size_of_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quant.main(["Small", "--dry-run", "--json", *FAST]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not (here / "Small-int4").exists()
    assert quant.main(["Small", "--json", *FAST]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == planned["bytes"]


def test_fit_says_what_it_raised_and_where_it_fits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quant.main(["Small", "fits", *FAST, "--fit", "rtx3060", "--ctx", "4K", "--json"]) == 0
    out, progress = capsys.readouterr()
    found = json.loads(out)
    assert found["fit"]["fits"] and found["fit"]["ctx_tokens"] == 4096 and found["fit"]["spare_bytes"] > 0
    assert {one["bits"] for one in found["results"]} == {8} and "sensitivity of layer 4/4" in progress
    assert len(found["fit"]["raised"]) == len(found["fit"]["sensitivities"]) == 16
    assert found["fit"]["plan"]["fits"] and sorted(path.name for path in here.iterdir()) == ["Small", "fits"]
    assert quant.main(["Small", "never", *FAST, "--fit", "rtx3060", "--ctx", "1M", "--seqs", "4096"]) == 1
    page = capsys.readouterr().out
    assert page.startswith("Does not fit rtx3060 at 1,048,576 tokens x 4096") and not (here / "never").exists()
    assert quant.main(["Small", "never", *FAST, "--fit", "rtx3061"]) == 2
    assert "rtx3060" in capsys.readouterr().err  # did you mean


def test_a_recipe_file_overrides(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "recipe.yaml").write_text("bits: 8\ngroup_size: -1\nmodules:\n  - {match: 'layers.0', bits: 16}\n")
    assert quant.main(["Small", "out", "--recipe", "recipe.yaml", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {result["bits"] for result in results} == {8} and not any("layers.0." in one["module"] for one in results)
    assert "group_size: -1" in (here / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["Small", "out", "--bits", "5"], "bits is 5: it is one of 4, 6, 8"),
        (["Small", "out", "--group-size", "100"], "group_size is 100"),
        (["Small", "out", "--method", "magic"], "method is 'magic'"),
        (["Small", "out", "--format", "awq", "--bits", "8"], "AWQ files hold asymmetric 4-bit"),
        (["Small", "out", "--max-ram", "much"], "no amount of memory"),
        (["Small", "out", "--device", "tpu9"], "torch has no such device"),
        (["Small", "out", "--calibration", "none.txt"], "none.txt"),
        (["Small", "out", "--recipe", "none.yaml"], "none.yaml cannot be read"),
        (["Small", "Small"], "one inside the other"),
        (["inspect", "nothing"], "nothing"),
        (["eval", "Small", "--reference", "nothing"], "nothing is no folder of config.json and safetensors"),
        (["eval", "small.gguf", "--reference", "Small"], "llama-perplexity says the divergence"),
        (["Small", "out", "--workers", "x"], "--workers x: give auto"),
        (["--no-such-option"], "--help"),
        (["inspect", "."], "neither safetensors nor GGUF"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert quant.main(words) == 2
    out, said = capsys.readouterr()
    assert sentence in said and said.startswith("qwen-quant: ") and said.count("\n") == 1 and not out
    assert [path.name for path in here.iterdir()] == ["Small"]  # nothing was begun


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a list", "a recipe is a list of `name: value`"),
        ("bitts: 4", "'bitts' is not one of bits, group_size"),
        ("bits: four", "bits is 'four'"),
        ("bits: true", "bits is True"),
        ("modules: {match: a}", "modules is a list"),
        ("modules: [{match: '(', bits: 8}]", "no regular expression"),
        ("modules: [{match: a, bits: 5}]", "bits of a rule is 5"),
        ("modules: [{match: a}]", "a rule is {match"),
        ("a: [", "is no YAML"),
        ("modules: [{match: '.', bits: 16}]", "nothing to quantize"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(
    here: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    (here / "recipe.yaml").write_text(text)
    assert quant.main(["Small", "out", "--recipe", "recipe.yaml"]) == 2
    assert sentence in capsys.readouterr().err


def test_an_interrupt_is_130_and_resumable(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, progress: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qwenfit.cli.quant.ProgressLine.show", interrupt)
        assert quant.main(["Small", *FAST]) == 130
    assert "--resume goes on" in capsys.readouterr().err and not (here / "Small-int4").exists()
    assert quant.main(["Small", *FAST, "--resume"]) == 0
    assert (here / "Small-int4" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyError("layer"), "KeyError: 'layer' (a bug in qwenfit: QWENFIT_DEBUG=1 shows where; please report it)"),
        (PermissionError(13, "Permission denied", "/etc/x"), "/etc/x: Permission denied"),
    ],
)
def test_nothing_is_a_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qwenfit.quant.quantize", fail)
    assert quant.main(["Small", *FAST]) == 2
    assert capsys.readouterr().err == f"qwen-quant: {sentence}\n"


def test_help_shows_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "qwenfit.cli.quant", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for word in ("inspect", "eval", "--bits", "--group-size", "--resume", "--max-ram", "Exit status"):
        assert word in done.stdout


def test_without_torch_it_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['torch'] = None; from qwenfit.cli.quant import main; sys.exit(main(['Small', 'out']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'qwenfit[quant]'" in done.stderr and "Traceback" not in done.stderr


def test_a_bar_on_a_terminal() -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    line = ProgressLine(stream)
    line.begin()
    line.show(Progress(8, 32, "model.layers.8.mlp.up_proj", 0.00123, 3900))
    line.close()
    first, last = stream.getvalue().removeprefix("\r").split("\r")
    assert first == "copying what is not quantized"
    assert last == "[#####...............] layer 9/32  mlp.up_proj  error 1.23e-03  1 h 5 min left\n"


def test_amounts_on_the_screen() -> None:
    assert [size(n) for n in (1_234_567, 9_050_000_000)] == ["1.2 MB", "9.05 GB"]
    assert [duration(s) for s in (40, 100, 720, 3900)] == ["40 s", "1 min 40 s", "12 min", "1 h 5 min"]
