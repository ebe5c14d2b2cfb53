"""What starts a plan: its line in every file, nothing secret in any, names that mean nothing but themselves.

What the real readers say of them (Kubernetes' schemas, compose, Ray, vLLM) is tests/engines/test_deployment_tools.py.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as some

from qwenfit.cli.deploy import text_of
from qwenfit.planner import Request, plan
from qwenfit.planner.deployment.bundle import Bundle, Speeds, bundle
from qwenfit.planner.deployment.compose import literal
from qwenfit.planner.deployment.launch import launch
from qwenfit.planner.deployment.ray_serve import engine_arguments
from qwenfit.planner.deployment.service import service, services
from qwenfit.planner.deployment.systemd import word
from qwenfit.profiles.errors import Unsupported

SHA = "0" * 64
CONFIGS = Path(__file__).parent / "data" / "model_configs.json"
ASKED: dict[str, dict[str, Any]] = {
    "vllm": {"model": "9b", "devices": ("rtx3090",), "engine": "vllm", "mtp": 2},
    "yarn": {"model": "27b", "devices": ("2xh100-sxm",), "engine": "vllm", "ctx_tokens": 1_010_000},
    "ours": {"model": "9b", "devices": ("rtx3060",), "engine": "vllm", "weights": "int4"},
    "amd": {"model": "27b", "devices": ("mi300x",), "engine": "vllm"},
    "cpu": {"model": "0.8b", "devices": ("desktop-ddr5-2ch-64gb",), "engine": "vllm"},
    "sglang": {"model": "35b-a3b", "devices": ("2xh100-sxm",), "engine": "sglang", "seqs": 8},
    "llama.cpp": {"model": "9b", "devices": ("rtx3060",), "engine": "llama.cpp", "vision": True},
    "boxes": {"model": "397b", "devices": ("8xa100-80gb",), "nodes": 2, "engine": "vllm"},
    "sparks": {"model": "397b", "devices": ("dgx-spark",), "nodes": 4, "tp": 4, "engine": "sglang"},
    "rpc": {"model": "122b-a10b", "devices": ("dgx-spark",), "nodes": 3, "engine": "llama.cpp", "ctx_tokens": 8192},
    "shared": {
        "model": "397b",
        "devices": ("8xa100-80gb",),
        "nodes": 2,
        "dp": 8,
        "tp": 2,
        "engine": "vllm",
        "seqs": 32,
    },
}


def made(name: str, **told: Any) -> Bundle:
    return bundle(plan(Request(**{**ASKED[name], **told})).best, SHA, Speeds())


def read(found: Bundle, name: str) -> Any:
    """As a reader of YAML sees the file."""
    return yaml.safe_load(text_of(found.files[name]))


def interpolated(text: str, environment: Mapping[str, str]) -> str:
    """What compose makes of a value: `$$` is a dollar, `${NAME:?why}` and `${NAME:-else}` a variable."""

    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name, _, rest = match[1].partition(":")
        return environment.get(name) or (rest[1:] if rest.startswith("-") else f"<{name}>")

    return re.sub(r"\$\$|\$\{([^}]*)\}", one, text)


def started(text: str) -> str:
    """What systemd makes of a word once its quotes are gone: `%%` is `%`, another `%` a specifier; `$` likewise."""
    text = re.sub(r"%(.?)", lambda match: "%" if match[1] == "%" else "<specifier>", text)
    return re.sub(r"\$(\$|\{([A-Z0-9_]+)\}|)", lambda match: "$" if match[1] == "$" else f"<{match[2]}>", text)


def kubernetes_words(container: Mapping[str, Any], node: int) -> list[str]:
    """What a kubelet makes of a command: `$$(` is `$(`, `$(NAME)` a variable."""
    known = {"LWS_LEADER_ADDRESS": "<HEAD_NODE_IP>", "LWS_WORKER_INDEX": str(node)}

    def one(match: re.Match[str]) -> str:
        return match[0][1:] if match[0].startswith("$$") else known[match[1]]

    return [re.sub(r"\$\$\(|\$\(([A-Z_]+)\)", one, text) for text in (*container["command"], *container["args"])]


def called(found: Bundle, program: str) -> str:
    """A program's name in the plan's line, from what its image calls it."""
    return {there: name for name, there in found.service.programs.items()}.get(program, program)


def lines(found: Bundle) -> list[list[str]]:
    """The plan's own words, box by box, without what stands before the program."""
    told = found.launch.plan.detail.get("node_commands", [found.launch.plan.command])
    words = [shlex.split(str(line)) for line in told]  # type: ignore[union-attr]
    return [[one for place, one in enumerate(box) if "=" not in one or place > 1] for box in words]


@pytest.mark.parametrize("name", ASKED)
def test_compose_starts_the_plans_line(name: str) -> None:
    found = made(name)
    for node, wanted in enumerate(lines(found)):
        told = read(found, "compose.yaml" if node == 0 else f"compose.box-{node}.yaml")["services"]["engine"]
        words = [interpolated(text, {}) for text in (*told["entrypoint"], *told["command"])]
        words[0] = called(found, words[0])
        extra = [*found.service.extra] if node == 0 else []
        if len(found.launch.boxes) > 1 and node == 0 and found.service.key_flag:
            extra += [found.service.key_flag, "<ENGINE_API_KEY>"]
        assert words == wanted + extra
        for assigned in shlex.split(found.launch.plan.command)[:1]:
            if "=" in assigned:
                variable, value = assigned.split("=")
                assert told["environment"][variable] == value


@pytest.mark.parametrize("name", ASKED)
def test_units_start_the_plans_line(name: str) -> None:
    found = made(name)
    for node, wanted in enumerate(lines(found)):
        text = found.files["systemd/engine.service" if node == 0 else f"systemd/engine-box-{node}.service"]
        (line,) = (one for one in text.splitlines() if one.startswith("ExecStart="))
        assert [started(one) for one in shlex.split(line.removeprefix("ExecStart="))] == wanted


@pytest.mark.parametrize("name", [name for name in ASKED if name != "rpc"])
def test_kubernetes_starts_the_plans_line(name: str) -> None:
    found = made(name)
    workload = read(found, "kubernetes/workload.yaml")
    wanted = lines(found)
    if len(wanted) == 1:
        assert workload["kind"] == "Deployment"
        containers = [workload["spec"]["template"]["spec"]["containers"][0]]
    else:
        assert workload["kind"] == "LeaderWorkerSet"
        group = workload["spec"]["leaderWorkerTemplate"]
        assert group["size"] == len(wanted)
        pods = [group["leaderTemplate"], *[group["workerTemplate"]] * (len(wanted) - 1)]
        containers = [pod["spec"]["containers"][0] for pod in pods]
    for node, (container, own) in enumerate(zip(containers, wanted, strict=True)):
        words = kubernetes_words(container, node)
        words[0] = called(found, words[0])
        assert words == own + (list(found.service.extra) if node == 0 else [])


@pytest.mark.parametrize("name", ASKED)
def test_no_file_has_a_secret_or_an_alias(name: str) -> None:
    found = made(name)
    for file, document in found.files.items():
        text = text_of(document)
        assert "sk-1234" not in text and "&id" not in text
        for line in text.splitlines():
            assigned = re.match(r"\s*#?-?\s*([A-Z_]*(?:KEY|PASSWORD|TOKEN|SECRET)[A-Z_]*)\s*[:=]\s*(\S.*)?$", line)
            if assigned and assigned[2]:
                assert re.match(r"^\"?(\$\{|os\.environ/|\{)", assigned[2]), (file, line)
    gateway = read(found, "gateway.yaml")["general_settings"]
    assert gateway["master_key"] == "os.environ/LITELLM_MASTER_KEY"
    composed = "".join(text_of(document) for file, document in found.files.items() if file.startswith("compose"))
    units = "".join(text for file, text in found.files.items() if file.endswith(".service"))
    for text, there in ((composed, ".env.example"), (units, "systemd/engine.env.example")):
        named = {line.partition("=")[0].lstrip("#") for line in found.files[there].splitlines() if "=" in line}
        assert set(re.findall(r"\$\{([A-Z0-9_]+)(?::\?|\})", text)) <= named


def test_images_are_pinned_by_the_plans_version() -> None:
    assert made("vllm").service.image == "docker.io/vllm/vllm-openai:v0.32.0"
    assert service("vllm", "0.31", "nvidia").image.endswith(":v0.31.0")
    assert made("llama.cpp").service.image == "ghcr.io/ggml-org/llama.cpp:server-cuda-b11434"
    assert made("sglang").service.image == "docker.io/lmsysorg/sglang:v0.5.23"
    for image in (services()["gateway"]["image"], services()["database"]["image"]):
        assert re.search(r":v?\d+\.\d", image)
    rows = [*services()["engines"].values(), services()["gateway"], services()["database"]]
    assert all(row["source"] and row["checked"] for row in rows)


def test_the_probe_waits_for_the_weights() -> None:
    """397B in bf16 is 807 GB: 807 s from a disk of 1 GB/s, 6,456 s before that at 1 Gbit/s, and ten minutes."""
    found = made("boxes", weights="bf16")
    size = found.launch.weights_bytes
    assert size == pytest.approx(807e9, rel=0.01)
    assert found.startup_s == int(600 + size / 1e9 + size / 125e6)
    probe = read(found, "kubernetes/workload.yaml")["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"][
        "containers"
    ][0]["startupProbe"]
    assert 0 <= probe["failureThreshold"] * probe["periodSeconds"] - found.startup_s < probe["periodSeconds"]
    assert read(found, "compose.yaml")["services"]["engine"]["healthcheck"]["start_period"] == f"{found.startup_s}s"
    quick = bundle(found.launch.plan, SHA, Speeds(disk_bytes_per_s=10e9, download_bytes_per_s=10e9))
    assert quick.startup_s < 800
    ours = made("ours")  # made here: nothing is downloaded
    assert ours.startup_s == int(600 + ours.launch.weights_bytes / 1e9)


def test_every_box_has_its_accelerators_and_the_volume_its_room() -> None:
    found = made("boxes")
    for file in ("compose.yaml", "compose.box-1.yaml"):
        (asked,) = read(found, file)["services"]["engine"]["deploy"]["resources"]["reservations"]["devices"]
        assert asked["count"] == 8
    volume = read(found, "kubernetes/volume.yaml")["spec"]
    assert volume["accessModes"] == ["ReadWriteMany"]
    assert int(volume["resources"]["requests"]["storage"].removesuffix("Gi")) << 30 > found.launch.weights_bytes
    one = made("amd")
    assert read(one, "kubernetes/workload.yaml")["spec"]["template"]["spec"]["containers"][0]["resources"] == {
        "limits": {"amd.com/gpu": "1"}
    }
    assert "/dev/kfd:/dev/kfd" in read(one, "compose.yaml")["services"]["engine"]["devices"]
    assert "resources" not in read(made("cpu"), "kubernetes/workload.yaml")["spec"]["template"]["spec"]["containers"][0]


def test_what_the_network_between_boxes_reaches_asks_for_a_key() -> None:
    for name in ("boxes", "sparks"):
        found = made(name)
        first = read(found, "compose.yaml")["services"]
        assert first["engine"]["network_mode"] == "host"
        assert "ENGINE_API_KEY" in json.dumps(first["engine"]) and "ENGINE_API_KEY" in json.dumps(first["gateway"])
        assert read(found, "gateway.yaml")["model_list"][0]["litellm_params"]["api_key"] == "os.environ/ENGINE_API_KEY"
    alone = read(made("vllm"), "compose.yaml")["services"]
    assert "ports" not in alone["engine"] and alone["gateway"]["ports"][0].startswith("${GATEWAY_ADDRESS:-127.0.0.1}")


def test_llama_cpp_calls_the_other_boxes() -> None:
    """tools/rpc/README.md of llama.cpp b11434: nobody is asked who they are, so each listens on the one address that
    `.env` names, and nothing of the gateway is there. The base image's own health check asks for llama-server."""
    found = made("rpc")
    boxes = [read(found, f"compose.box-{node}.yaml")["services"] for node in (1, 2)]
    first = read(found, "compose.yaml")["services"]
    for node, box in enumerate(boxes, 1):
        engine = box["engine"]
        assert engine["command"] == ["-H", f"${{NODE_{node}_IP:?see .env.example}}", "-p", "50052"]
        assert engine["network_mode"] == "host" and "ports" not in engine and "volumes" not in engine
        assert engine["healthcheck"] == {"disable": True} and list(box) == ["engine"]
        assert (engine["image"], engine["build"]) == (first["engine"]["image"], ".")
    assert first["engine"]["networks"] == ["serving"] and "network_mode" not in first["engine"]
    assert "ENGINE_API_KEY" not in json.dumps(first) + text_of(found.files["gateway.yaml"])
    assert "extra_hosts" not in first["gateway"]
    built = found.files["Dockerfile"].splitlines()
    assert f"FROM {found.service.image}" in built and found.service.image.endswith(":server-cuda-b11434")
    assert any("--branch b11434 https://github.com/ggml-org/llama.cpp " in line for line in built)
    assert any("-DGGML_RPC=ON" in line and "-DGGML_BACKEND_DL=ON" in line for line in built)
    assert not [file for file in found.files if file.startswith(("kubernetes", "ray"))]
    assert "kubernetes: no image of llama.cpp with its RPC backend" in found.left_out[0]
    assert "kubectl" not in found.files["README.md"] and "check nobody" in found.files["README.md"]
    link = found.launch.plan.setup.interconnect
    assert link and found.startup_s == int(600 + found.launch.weights_bytes * (1 / 1e9 + 1 / link.bytes_per_s))


@pytest.mark.parametrize(("name", "port"), [("vllm", 8000), ("sglang", 30000), ("llama.cpp", 8080)])
def test_prometheus_and_the_probes_ask_where_the_engine_answers(name: str, port: int) -> None:
    """/metrics and /health: vllm 0.32 `entrypoints/serve/instrumentator`, sglang 0.5.23 `utils/common.py` and
    `entrypoints/http_server.py` (metrics where --enable-metrics asks for them), llama.cpp b11434 `tools/server`."""
    found = made(name)
    (job,) = read(found, "prometheus.yaml")["scrape_configs"]
    assert job["metrics_path"] == "/metrics" and job["static_configs"][0]["targets"] == [f"engine:{port}"]
    container = read(found, "kubernetes/workload.yaml")["spec"]["template"]["spec"]["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    assert container["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert f"http://127.0.0.1:{port}/health" in str(read(found, "compose.yaml")["services"]["engine"]["healthcheck"])
    (upstream,) = read(found, "gateway.yaml")["model_list"]
    assert upstream["litellm_params"]["api_base"] == f"http://engine:{port}/v1"
    assert "--enable-metrics" in found.service.extra or name != "sglang"


def test_ray_gets_vllms_arguments_under_their_names() -> None:
    words = (
        "vllm", "serve", "m", "--max-model-len", "8192", "--no-enable-prefix-caching", "--kv-cache-dtype", "auto",
        "--speculative-config", '{"method":"mtp"}', "--gpu-memory-utilization", "0.9", "--enforce-eager",
        "--nnodes", "2", "--node-rank", "0", "--master-addr", "x", "--headless",
    )  # fmt: skip
    assert engine_arguments(words) == {
        "max_model_len": 8192,
        "enable_prefix_caching": False,
        "kv_cache_dtype": "auto",
        "speculative_config": {"method": "mtp"},
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
    }
    told = read(made("boxes"), "ray-serve.yaml")["applications"][0]["args"]["llm_configs"][0]
    assert (told["engine_kwargs"]["tensor_parallel_size"], told["engine_kwargs"]["pipeline_parallel_size"]) == (8, 2)
    assert told["accelerator_type"] == "A100-80G"
    assert "ray-serve.yaml" not in made("shared").files and "ray-serve.yaml" in made("shared").left_out[0]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"devices": ("m3-max-128gb",), "engine": "mlx"}, "no container of mlx"),
        ({"devices": ("rtx3060",), "engine": "transformers"}, "no container of transformers"),
        ({"devices": ("rtx3060",), "engine": "ollama"}, "no container of ollama"),
    ],
)
def test_what_no_file_could_start_is_said(told: dict[str, Any], said: str) -> None:
    with pytest.raises(Unsupported, match=said):
        bundle(plan(Request(**{"model": "9b", "ctx_tokens": 8192, **told})).best, SHA, Speeds())


NASTY = some.text(
    some.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\0/\n\r")
    | some.sampled_from("$%\"'\\{}:#&*! "),
    min_size=1,
    max_size=12,
)


@given(NASTY)
@example("%h $X ${Y} $(Z) \\ \" ' # {{a}} %%")
def test_words_mean_themselves_to_every_reader(text: str) -> None:
    assert interpolated(yaml.safe_load(text_of({"x": literal(text)}))["x"], {}) == text
    (again,) = shlex.split(word(text))
    assert started(again) == text
    (again,) = shlex.split(word(text, expands=False))
    assert re.sub(r"%(.?)", lambda match: "%" if match[1] == "%" else "<specifier>", again) == text


def hostile_plan(folder: Path) -> Any:
    """A checkpoint of the 0.8B in a folder whose name every reader could take for something of its own."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(json.loads(CONFIGS.read_text())["models"]["qwen3.5-0.8b"]))
    return plan(Request(str(folder), ("rtx3060",), 8192, engine="vllm")).best


def test_a_hostile_name_stays_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "a b;$(touch x) $(LWS_WORKER_INDEX) ${HOME} %h 'q' \"d\" {{x}} # -"
    found = bundle(hostile_plan(folder), SHA, Speeds())
    assert found.launch.local and found.launch.model == str(folder)
    told = read(found, "compose.yaml")["services"]["engine"]
    assert interpolated(told["command"][1], {}) == str(folder)
    assert interpolated(told["volumes"][0]["source"], {}) == str(folder)
    container = read(found, "kubernetes/workload.yaml")["spec"]["template"]["spec"]["containers"][0]
    assert kubernetes_words(container, 0)[2] == str(folder)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", found.launch.name)
    assert launch(found.launch.plan).boxes[0][2] == str(folder)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
@pytest.mark.parametrize("name", ["vllm", "yarn", "llama.cpp", "boxes", "hostile"])
def test_systemd_takes_the_units(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "a b;$(touch x) ${HOME} %h 'q' \"d\""
    found = bundle(hostile_plan(folder), SHA, Speeds()) if name == "hostile" else made(name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for program in ("vllm", "llama-server"):
        (programs / program).write_text("#!/bin/sh\n")
        (programs / program).chmod(0o755)
    for file, text in found.files.items():
        if not file.endswith(".service"):
            continue
        unit = tmp_path / f"qwenfit-{Path(file).name}"
        text = text.replace("ExecStart=", f"ExecStart={programs}/")  # `verify` does not look along ExecSearchPath
        unit.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(unit)],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 and unit.name not in done.stderr, done.stderr


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl here")
@pytest.mark.parametrize("name", ["vllm", "boxes"])
def test_kustomize_builds_the_folder(name: str, tmp_path: Path) -> None:
    found = made(name)
    for file, document in found.files.items():
        if file.startswith("kubernetes/"):
            (tmp_path / Path(file).name).write_text(text_of(document))
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kinds = {document["kind"] for document in yaml.safe_load_all(done.stdout)}
    assert kinds == {"Service", "PersistentVolumeClaim", "Deployment" if name == "vllm" else "LeaderWorkerSet"}
