"""Calibration: from receipts of a made-up machine whose constants are known, and of whose truth the fit is judged by
what it did not see.
"""

import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.planner import EnginePlan, Options, Request, plan
from qwenfit.planner.calibration import (
    LARGEST_FACTOR,
    Calibration,
    Factor,
    fit,
    held_out,
    version_family,
    witnesses,
)
from qwenfit.planner.calibration_file import read_calibration, text
from qwenfit.planner.logs.dialect import LoggedPart
from qwenfit.planner.logs.engine_log import EngineLog
from qwenfit.planner.memory import Amount, exactly
from qwenfit.planner.receipt import Receipt, receipt, rescored
from qwenfit.planner.scores import PartScore, at_boot
from qwenfit.profiles.errors import BadInput
from qwenfit.profiles.frozen import replace

MIB = 1 << 20
RUNS = [
    (model, device, ctx_tokens, seqs)
    for model, device in (("9b", "rtx3090"), ("4b", "rtx3090"), ("9b", "rtx4090"), ("9b", "a100-80gb"), ("4b", "l4"))
    for ctx_tokens, seqs in ((8192, 4), (32768, 16))
]


def planned(engine: str = "vllm@0.31.0", **asked: Any) -> EnginePlan:
    return plan(Request(engine=engine, weights="int4" if engine.startswith("v") else "q4_k_m", **asked)).best


def logged(found: EnginePlan, factors: dict[str, float], chance: Random, spread: float) -> EngineLog:
    """What a boot of the plan would print on a machine whose parts take so many times what is built in."""
    memory = at_boot(found, "device0")
    assert memory is not None
    parts = []
    for part, amount in memory.parts.items():
        factor = factors.get(part, 1.0) * (1 if amount.exact else 1 + chance.uniform(-spread, spread))
        if amount.mid and (amount.exact or part in factors):
            parts.append(LoggedPart(part, "device0", round(amount.mid * factor), MIB // 100, "x"))
    return EngineLog(found.engine, found.engine_version, "x", parts=tuple(parts))


def made(
    factors: dict[str, float], spread: float = 0.05, engine: str = "vllm@0.31.0", runs: int = len(RUNS)
) -> list[Receipt]:
    chance = Random(7)
    found = []
    for place, (model, device, ctx_tokens, seqs) in enumerate(RUNS[:runs]):
        one = planned(engine, model=model, devices=(device,), ctx_tokens=ctx_tokens, seqs=seqs)
        log = logged(one, factors, chance, spread)
        found.append(receipt(one, log, "2026-11-22", "0", f"https://example.org/{place}"))
    return found


def factor_of(made: Calibration, part: str) -> Factor:
    return next(one for one in made.factors if (one.part, one.versions, one.architecture) == (part, "", ""))


def test_a_shifted_set_is_learned_and_the_unseen_is_predicted() -> None:
    """Graphs at a third and activations at 1.4 times what is built in, 5 % of noise: the factors come near, and a
    receipt that was not seen is predicted within a few percent where it was off by tens or hundreds."""
    receipts = made({"graph": 0.33, "activation": 1.4})
    errors = {one.part: one for one in held_out(receipts)}
    assert errors["graph"].before > 1.5 and errors["graph"].after < 0.65 * errors["graph"].before
    assert errors["activation"].before > 0.25 and errors["activation"].after < 0.6 * errors["activation"].before
    assert errors["graph"].receipts == len(RUNS) and errors["graph"].within > 0.8
    found = fit(receipts)
    assert 0.3 < factor_of(found, "graph").factor < 0.6
    assert 1.2 < factor_of(found, "activation").factor < 1.5


def test_held_out_errors_are_honest_where_nothing_can_be_learned() -> None:
    """Receipts that agree on nothing: fitted on themselves they would look better than they predict."""
    chance = Random(3)
    receipts = [
        receipt(
            one, logged(one, {"graph": chance.choice([0.2, 5.0])}, chance, 0.0), "2026-11-22", "0", f"https://x/{n}"
        )
        for n, one in enumerate(
            planned(model=model, devices=(device,), ctx_tokens=ctx, seqs=seqs) for model, device, ctx, seqs in RUNS
        )
    ]
    [errors] = [one for one in held_out(receipts) if one.part == "graph"]
    assert errors.after > 0.5 * errors.before


def test_exact_parts_and_what_fits_surely_are_never_touched() -> None:
    receipts = made({"graph": 0.33, "activation": 1.4})
    found = fit(receipts)
    assert {one.part for one in found.factors} <= {"activation", "graph", "runtime"}
    for one in receipts:
        before = {(part.part, part.place): part for part in rescored(one) or ()}
        for after in rescored(one, found) or ():
            if after.planned.exact:
                assert after == before[after.part, after.place]


def test_a_receipt_of_weights_that_are_off_makes_no_factor() -> None:
    [one] = made({}, runs=1)
    wrong = LoggedPart("weights", "device0", one.log.parts[0].bytes * 2, 0, "x")
    log = EngineLog("vllm", "0.31.0", None, parts=(wrong,))
    odd = replace(one, log=log)
    assert witnesses([odd]) == () and fit([odd]).factors == ()


def test_what_is_told_as_exact_is_no_witness() -> None:
    """A receipt whose plan cannot be made anew speaks by the scores in its file."""
    [one] = made({}, runs=1)
    odd = replace(one, request=replace(one.request, model="a-file-of-mine"))
    assert rescored(odd) is None
    planned_bytes = 60 * MIB
    estimated = PartScore("graph", "device0", Amount(1, planned_bytes, 99 * MIB), 30 * MIB, 0, 1.0, True)
    [witness] = witnesses([replace(odd, scores=(estimated,))])
    assert witness.ratio == 0.5
    exact = replace(estimated, planned=exactly(planned_bytes))
    assert witnesses([replace(odd, scores=(exact,))]) == ()


def test_few_are_believed_less_than_many_and_one_source_is_one_voice() -> None:
    alone = factor_of(fit(made({"graph": 0.33}, 0.0, runs=1)), "graph")
    many = factor_of(fit(made({"graph": 0.33}, 0.0)), "graph")
    assert many.factor < alone.factor < 1
    assert alone.factor == pytest.approx(0.33 ** (1 / 4), rel=0.02)  # one source beside three of the built-in constant
    one = made({"graph": 0.33}, 0.0, runs=1)
    assert factor_of(fit(one * 50), "graph").factor == pytest.approx(alone.factor)


def test_one_wild_receipt_moves_nothing() -> None:
    good = made({"graph": 0.5}, 0.0)
    wild = made({"graph": 12.0}, 0.0, runs=1)
    wild = [replace(wild[0], source="https://wild")]
    before, after = factor_of(fit(good), "graph").factor, factor_of(fit(good + wild), "graph").factor
    assert after == pytest.approx(before, rel=0.1)
    beyond = made({"graph": 2 * LARGEST_FACTOR}, 0.0, runs=1)
    assert not [one for one in witnesses(beyond) if one.part == "graph"]


def test_versions_and_architectures_get_their_own_where_there_is_enough() -> None:
    old = made({"graph": 0.3}, 0.0)
    new = made({"graph": 3.0}, 0.0, engine="vllm@0.24.0")
    new = [replace(one, source=f"{one.source}/b") for one in new]
    found = fit(old + new)
    devices = old[0].devices
    newest, older, unknown = (found.factor("vllm", version, devices, "graph") for version in ("0.31.2", "0.24", "0.28"))
    assert newest and older and unknown
    assert newest.factor < 0.7 < unknown.factor < 1.6 < older.factor
    assert found.factor("sglang", "0.5.23", devices, "graph") is None


def test_llama_cpp_s_runtime_is_calibrated_and_its_buffers_are_not() -> None:
    receipts = made({"runtime": 2.0, "activation": 1.5}, 0.0, engine="llama.cpp@b11434", runs=4)
    found = fit(receipts)
    assert {(one.engine, one.part) for one in found.factors} == {("llama.cpp", "runtime")}
    request = Request(model="9b", devices=("rtx3090",), ctx_tokens=8192, engine="llama.cpp", weights="q4_k_m")
    before = plan(request).best.devices[0].memory
    changed = replace(request, options=Options(calibration=found))
    after = plan(changed).best.devices[0].memory
    assert after.runtime.mid > 1.3 * before.runtime.mid
    assert (after.weights, after.kv_cache, after.recurrent_state) == (
        before.weights,
        before.kv_cache,
        before.recurrent_state,
    )
    assert after.activation == before.activation


@pytest.mark.parametrize("engine", ["vllm", "sglang", "llama.cpp", "ollama"])
def test_the_planner_uses_a_calibration_when_asked_to(engine: str) -> None:
    names = {"ollama": "llama.cpp"}
    factors = tuple(
        Factor(names.get(engine, engine), part, "", "", 3, 3, 2.0, 0.5, 1.5)
        for part in (("runtime",) if engine in ("llama.cpp", "ollama") else ("activation", "graph", "runtime"))
    )
    calibration = Calibration("mine.yaml", factors)
    weights = "bf16" if engine in ("vllm", "sglang") else "q4_k_m"
    request = Request(model="9b", devices=("rtx5090",), ctx_tokens=8192, engine=engine, weights=weights)
    options = Options(calibration=calibration)
    plain, tuned = plan(request), plan(replace(request, options=options))
    before, after = plain.best.devices[0].memory, tuned.best.devices[0].memory
    assert after.runtime.mid == pytest.approx(2 * before.runtime.mid, rel=0.01)
    assert after.weights == before.weights and after.recurrent_state == before.recurrent_state
    if engine in ("vllm", "sglang"):
        assert after.graph.mid == pytest.approx(2 * before.graph.mid, rel=0.01)
    assert "calibration" not in plain.to_json()["request"]["options"]  # type: ignore[index]
    assert tuned.to_json()["request"]["options"]["calibration"] == "mine.yaml"  # type: ignore[index]


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    found = fit(made({"graph": 0.33, "activation": 1.4}))
    path = tmp_path / "constants.yaml"
    path.write_text(text(found), encoding="utf-8")
    back = read_calibration(str(path))
    assert [(one.engine, one.part, one.versions, one.architecture) for one in back.factors] == [
        (one.engine, one.part, one.versions, one.architecture) for one in found.factors
    ]
    for one, other in zip(back.factors, found.factors, strict=True):
        assert (one.factor, one.low, one.high) == pytest.approx((other.factor, other.low, other.high), abs=1e-4)


ENTRY = {
    "engine": "vllm",
    "part": "graph",
    "receipts": 3,
    "sources": 3,
    "factor": 1.5,
    "low": 0.5,
    "high": 2.0,
}


def written(tmp_path: Path, *entries: dict[str, Any], head: str = "schema: 1") -> str:
    path = tmp_path / "x.yaml"
    lines = [head, "factors:"]
    for entry in entries:
        lines += [f"{'  - ' if not n else '    '}{key}: {value}" for n, (key, value) in enumerate(entry.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"factor": 1e9}, "factor"),
        ({"factor": 0}, "factor"),
        ({"factor": -1}, "factor"),
        ({"factor": ".nan"}, "factor"),
        ({"factor": ".inf"}, "factor"),
        ({"low": 1.5}, "low"),
        ({"high": 0.5}, "high"),
        ({"high": 1000}, "high"),
        ({"receipts": 0}, "receipts"),
        ({"part": "weights"}, "part"),
        ({"part": "kv_cache"}, "part"),
        ({"engine": "mlx"}, "engine"),
        ({"engine": "llama.cpp", "part": "activation"}, "exactly"),
        ({"versions": '"../../etc"'}, "versions"),
        ({"more": 1}, "more"),
    ],
)
def test_an_absurd_or_hostile_file_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"x.yaml, line \\d+: .*{says}"):
        read_calibration(written(tmp_path, {**ENTRY, **changes}))


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    for entries, head, says in (
        ((ENTRY, ENTRY), "schema: 1", "has a factor already"),
        ((ENTRY,), "schema: 2", "schema"),
        ((), "schema: 1", "factors"),
    ):
        with pytest.raises(BadInput, match=says):
            read_calibration(written(tmp_path, *entries, head=head))
    with pytest.raises(BadInput, match="cannot be read"):
        read_calibration(str(tmp_path / "none.yaml"))
    with pytest.raises(BadInput, match=r"unknown key 'rows': .*there are schema, factors$"):
        read_calibration(written(tmp_path, head="rows: 1"))
    (tmp_path / "x.yaml").write_text("schema: 1\nfactors: [" * 100, encoding="utf-8")
    with pytest.raises(BadInput):
        read_calibration(str(tmp_path / "x.yaml"))


def test_hundreds_of_sources_are_left_out_several_at_once() -> None:
    receipts = [replace(one, source=f"https://x/{n}/{m}") for n in range(40) for m, one in enumerate(BASE)]
    begun = time.process_time()
    [errors] = [one for one in held_out(receipts) if one.part == "graph"]
    assert time.process_time() - begun < 10
    assert errors.receipts == 160 and errors.after < 0.1 * errors.before


def test_nothing_to_say_is_no_file() -> None:
    with pytest.raises(BadInput, match="nothing to calibrate"):
        text(Calibration("x", ()))


@pytest.mark.parametrize(
    ("version", "family"),
    [
        ("0.31.2", "0.31"),
        ("0.5.23", "0.5"),
        ("b11434", "b11"),
        ("b8946", "b8"),
        ("v0.8.5.dev169+g1", "0.8"),
        ("", ""),
        (None, ""),
    ],
)
def test_families_of_versions(version: str | None, family: str) -> None:
    assert version_family(version) == family


BASE = made({"graph": 0.5}, 0.0, runs=4)


@given(st.lists(st.integers(1, 1 << 44), min_size=4, max_size=4))
@settings(max_examples=25, deadline=None)
def test_whatever_was_logged_a_fit_is_within_bounds(amounts: list[int]) -> None:
    receipts = []
    for one, amount in zip(BASE, amounts, strict=True):
        log = EngineLog("vllm", "0.31.0", None, parts=(LoggedPart("graph", "device0", amount, 0, "x"),))
        receipts.append(replace(one, log=log))
    for one in fit(receipts).factors:
        assert 1 / LARGEST_FACTOR <= one.factor <= LARGEST_FACTOR
        assert 0 < one.low <= 1 <= one.high
    held_out(receipts)


def test_native_runs_teach_scratch_and_runtime() -> None:
    """Receipts of `qwen-plan verify`: activations at 0.8 and the runtime at 1.2 times what is built in. A plan with
    what was learned comes nearer to a run that was not seen."""
    factors, chance, found = {"activation": 0.8, "runtime": 1.2}, Random(3), []
    for place, (name, ctx_tokens) in enumerate((("0.8b", 4096), ("0.8b", 32768), ("4b", 4096), ("4b", 32768))):
        one = plan(Request(name, ("epyc-rome-8ch-128gb",), ctx_tokens, engine="native", weights="int4")).best
        log = logged(one, factors, chance, 0.02)
        found.append(receipt(one, log, "2026-11-22", "0", f"qwen-plan verify, plan {place}"))
    own = fit(found)
    assert {one.part for one in own.factors} == {"activation", "runtime"} and {one.engine for one in own.factors} == {
        "native"
    }
    for part, truth in factors.items():
        assert min(1.0, truth) < factor_of(own, part).factor < max(1.0, truth)
    unseen = Request("9b", ("epyc-rome-8ch-128gb",), 8192, engine="native", weights="int8")
    before = plan(unseen).best.devices[0].memory
    after = plan(replace(unseen, options=replace(unseen.options, calibration=own))).best.devices[0].memory
    for part, truth in factors.items():
        real = before.parts[part].mid * truth
        assert abs(after.parts[part].mid - real) < 0.6 * abs(before.parts[part].mid - real)
    assert all(one.after < one.before for one in held_out(found))
