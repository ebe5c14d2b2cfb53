"""Everything that starts a plan, as documents by file name: nothing is written here."""

from collections.abc import Callable, Mapping
from typing import Any

from ...profiles.errors import Unsupported
from ...profiles.frozen import dataclass
from ..engines.launch import node_address
from ..plan import EnginePlan
from .compose import box_compose, compose
from .gateway import gateway, prometheus
from .kubernetes import manifests
from .launch import Launch, launch, placed
from .ray_serve import ray_serve
from .rpc_image import dockerfile
from .service import Service, service
from .systemd import unit

DISK_BYTES_PER_S = 1e9  # where nobody says: an NVMe drive that others use too
DOWNLOAD_BYTES_PER_S = 125e6  # 1 Gbit/s
BAD = ("\0", "\n", "\r")


@dataclass(frozen=True, slots=True)
class Speeds:
    """How fast weights arrive: from the disk, and before the first start from the hub."""

    disk_bytes_per_s: float = DISK_BYTES_PER_S
    download_bytes_per_s: float = DOWNLOAD_BYTES_PER_S


@dataclass(frozen=True, slots=True)
class Bundle:
    """`files`: text, or a document that is written as YAML. `left_out`: what there is no file for, and why."""

    launch: Launch
    service: Service
    startup_s: int
    files: Mapping[str, Any]
    left_out: tuple[str, ...]


def bundle(plan: EnginePlan, sha256: str, speeds: Speeds) -> Bundle:
    """Unsupported, in a sentence, for what no container, unit or manifest could start."""
    started = launch(plan)
    if any(character in word for box in started.boxes for word in box for character in BAD):
        raise Unsupported("a word of the launch line has a line break or a zero byte in it: rename the model's folder")
    runs = service(plan.engine, plan.engine_version, started.vendor)
    startup_s = started.startup_s(speeds.disk_bytes_per_s, speeds.download_bytes_per_s)
    left_out: list[str] = []
    cluster = _made(lambda: manifests(started, runs, startup_s, sha256), "kubernetes", left_out)
    ray = _made(lambda: ray_serve(started), "ray-serve.yaml", left_out) if len(started.boxes) > 1 else None
    others = range(1, len(started.boxes))
    files: dict[str, Any] = {
        "compose.yaml": compose(started, runs, startup_s),
        **{f"compose.box-{node}.yaml": box_compose(started, runs, startup_s, node) for node in others},
        **({"Dockerfile": dockerfile(started, runs)} if started.calls_boxes else {}),
        "gateway.yaml": gateway(started, runs),
        ".env.example": _environment(started),
        "prometheus.yaml": prometheus(started, runs),
        "README.md": _readme(started, startup_s, sha256, bool(cluster)),
        "systemd/engine.service": unit(started, runs, startup_s, 0, sha256),
        **{f"systemd/engine-box-{node}.service": unit(started, runs, startup_s, node, sha256) for node in others},
        "systemd/engine.env.example": _unit_environment(started),
        **{f"kubernetes/{name}": document for name, document in (cluster or {}).items()},
        **({"ray-serve.yaml": ray} if ray else {}),
    }
    return Bundle(started, runs, startup_s, files, tuple(left_out))


def _made(make: Callable[[], Mapping[str, Any]], name: str, left_out: list[str]) -> Mapping[str, Any] | None:
    """What can be left out of a bundle; None, and the reason in `left_out`, where it has to be."""
    try:
        return make()
    except Unsupported as reason:
        left_out.append(f"{name}: {reason}")
        return None


def _readme(launch: Launch, startup_s: int, sha256: str, for_cluster: bool) -> str:
    """What to do with the files, as short as it can be said."""
    boxes, name = len(launch.boxes), launch.name
    lines = [
        f"# {name} on {launch.plan.engine} {launch.plan.engine_version}",
        "",
        f"Made by `qwen-plan deploy` from the plan {sha256}. The first answer may take {-(-startup_s // 60)} minutes.",
        "",
        "* Containers: `cp .env.example .env`, fill it in, `docker compose up -d`. Clients speak to the gateway, port "
        f"4000, as they would to OpenAI, with the model `{name}`; `POST /key/generate` with the master key makes a key "
        "for each of them.",
    ]
    if boxes > 1:
        meet = (
            "in the others before the first, which calls them. The image is built there from `Dockerfile`. Their "
            "servers check nobody: their addresses have to be on a network that only these boxes are on."
            if launch.calls_boxes
            else "all at about the same time: they wait for one another."
        )
        lines += [
            f"* {boxes} boxes: copy the folder and `.env` to each. In box N `docker compose -f compose.box-N.yaml up "
            f"-d`, in the first as above, {meet}"
        ]
    lines += [
        "* No containers: `systemd/*.service` to `/etc/systemd/system`, `systemd/engine.env.example` to "
        "`/etc/qwenfit/engine.env`; a user `qwenfit`, and the engine in `/opt/qwenfit/bin`. "
        + ("vLLM listens on every interface" if launch.plan.engine == "vllm" else "It listens on this machine only")
        + ", and asks for no key unless the environment file names one.",
    ]
    if for_cluster:
        installed = " (with LeaderWorkerSet installed)" if boxes > 1 else ""
        lines += [
            f"* A cluster: `kubectl apply -k kubernetes/`{installed}. The Service is for inside; put the cluster's own "
            "gateway before it."
        ]
    lines += ["* Monitoring: `prometheus.yaml` names the engine's metrics."]
    if launch.folder is not None:
        lines += [f"* Weights: `{launch.model}` has to be at the same place on the machine that serves."]
    elif launch.local:
        cluster = ", or on the volume of `kubernetes/volume.yaml`" if for_cluster else ""
        lines += [
            f"* Weights: `{launch.model}` first has to be in `models/` beside `compose.yaml` (`.env` may name another "
            f"folder), for systemd in `/var/lib/qwenfit`{cluster}."
        ]
    if launch.plan.warnings:
        lines += [
            "",
            "What the plan warns of:",
            "",
            *(f"* {' '.join(warning.split())}" for warning in launch.plan.warnings),
        ]
    return "\n".join(lines) + "\n"


def _environment(launch: Launch) -> str:
    """Names, and no value that would be a secret."""
    lines = [
        "# Copy to .env and fill in; compose reads it. `openssl rand -hex 32` makes a good value for the first three.",
        "# LITELLM_MASTER_KEY begins with sk-; LITELLM_SALT_KEY encrypts what the database holds and is never changed.",
        "LITELLM_MASTER_KEY=",
        "LITELLM_SALT_KEY=",
        "# Letters and digits only: it becomes part of an address.",
        "POSTGRES_PASSWORD=",
        "# The gateway listens on this machine only, unless it is told otherwise (behind TLS).",
        "#GATEWAY_ADDRESS=127.0.0.1",
        "#GATEWAY_PORT=4000",
    ]
    if not launch.local:
        lines += ["# For gated repositories, or a higher rate of downloads.", "#HF_TOKEN="]
    elif launch.folder is None:
        lines += ["# Where the model's files lie.", "#MODELS_DIR=./models"]
    if launch.calls_boxes:
        lines += [
            "# In every box: addresses of the others on a network that only these boxes are on; nobody is asked who "
            "they are.",
            *_box_addresses(launch),
        ]
    elif len(launch.boxes) > 1:
        lines += [
            "# In every box: where the others reach the first, and over which interface (`ip -br address`).",
            "HEAD_NODE_IP=",
            "NCCL_SOCKET_IFNAME=",
            "# In the first box: what the gateway says to the engine, which the network between the boxes can reach.",
            "ENGINE_API_KEY=",
        ]
    return "\n".join(lines) + "\n"


def _box_addresses(launch: Launch) -> list[str]:
    return [placed(node_address(node), lambda name: f"{name}=") for node in range(1, len(launch.boxes))]


def _unit_environment(launch: Launch) -> str:
    lines = ["# Copy to /etc/qwenfit/engine.env, mode 0600."]
    if launch.calls_boxes:
        lines += _box_addresses(launch)
    elif len(launch.boxes) > 1:
        lines += ["HEAD_NODE_IP=", "NCCL_SOCKET_IFNAME=", "GLOO_SOCKET_IFNAME="]
    if not launch.local:
        lines += ["#HF_TOKEN="]
    if launch.plan.engine == "vllm":
        lines += ["# Clients then have to say it: Authorization: Bearer ...", "#VLLM_API_KEY="]
    if launch.plan.engine == "llama.cpp":
        lines += ["# Clients then have to say it: Authorization: Bearer ...", "#LLAMA_API_KEY="]
    return "\n".join(lines) + "\n"
