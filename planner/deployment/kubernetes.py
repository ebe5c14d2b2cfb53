"""Kubernetes manifests: a Deployment for one box, a LeaderWorkerSet for several, a Service, a volume, a kustomization.

LeaderWorkerSet v1 (kubernetes-sigs/lws, api/leaderworkerset/v1): a leader and its workers start and fail together, and
each knows the leader's address and its own place, LWS_LEADER_ADDRESS and LWS_WORKER_INDEX. In a container's arguments
`$(NAME)` is a variable of its environment, so a `$(` of the plan is written `$$(`.
"""

from typing import Any

from ...profiles.errors import Unsupported
from .compose import HUB_CACHE, MODELS
from .launch import Launch, placed
from .service import Service

GIB = 1 << 30
RESOURCES = {"nvidia": "nvidia.com/gpu", "amd": "amd.com/gpu", "intel": "gpu.intel.com/xe"}
PROBE_PERIOD_S = 10
VOLUME_SHARE = 1.25  # of the checkpoint: downloads lie beside what they become for a moment
HF_SECRET = "huggingface"  # kubectl create secret generic huggingface --from-literal=HF_TOKEN=...
Document = dict[str, Any]


def manifests(launch: Launch, service: Service, startup_s: int, sha256: str) -> dict[str, Document]:
    """Documents by file name. Unsupported for devices that no cluster hands out, and for lines that differ from box to
    box in more than their place."""
    if launch.vendor not in ("cpu", *RESOURCES):
        raise Unsupported(f"no Kubernetes resource is known for {launch.vendor} devices")
    if launch.calls_boxes:
        raise Unsupported("no image of llama.cpp with its RPC backend is published for a cluster to pull")
    several = len(launch.boxes) > 1
    workload = _leader_worker_set(launch, service, startup_s) if several else _deployment(launch, service, startup_s)
    files: dict[str, Document] = {
        "workload.yaml": workload,
        "service.yaml": _service(launch, service, several),
        "volume.yaml": _volume(launch, several),
    }
    for document in files.values():
        document["metadata"]["labels"] = _labels(launch)
        document["metadata"]["annotations"] = {"qwenfit/plan-sha256": sha256}
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [*files]}
    return {**files, "kustomization.yaml": kustomization}


def _labels(launch: Launch) -> dict[str, str]:
    return {"app.kubernetes.io/name": launch.name, "app.kubernetes.io/component": "engine"}


def _deployment(launch: Launch, service: Service, startup_s: int) -> Document:
    container = _container(launch, service, _arguments(launch.boxes[0], service))
    container |= _probes(service, startup_s)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": launch.name},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # two at a time would need the accelerators twice
            "progressDeadlineSeconds": startup_s + 600,
            "selector": {"matchLabels": _labels(launch)},
            "template": {"metadata": {"labels": _labels(launch)}, "spec": _pod(launch, container)},
        },
    }


def _leader_worker_set(launch: Launch, service: Service, startup_s: int) -> Document:
    leader = _container(launch, service, _arguments(launch.boxes[0], service))
    worker = _container(launch, service, [_escaped(word) for word in _worker_words(launch)])
    leader |= _probes(service, startup_s)
    worker.pop("ports")
    labels = _labels(launch)
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": launch.name},
        "spec": {
            "replicas": 1,
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": len(launch.boxes),
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {
                    "metadata": {"labels": {**labels, "qwenfit/role": "leader"}},
                    "spec": _pod(launch, leader),
                },
                "workerTemplate": {
                    "metadata": {"labels": {**labels, "qwenfit/role": "worker"}},
                    "spec": _pod(launch, worker),
                },
            },
        },
    }


_ADDRESS, _PLACE = "$(LWS_LEADER_ADDRESS)", "$(LWS_WORKER_INDEX)"


def _worker_words(launch: Launch) -> tuple[str, ...]:
    """The line that all boxes behind the first share once their place stands for its number."""
    words = list(launch.boxes[1])
    for flag in ("--node-rank", "--data-parallel-start-rank"):
        if flag in words:
            words[words.index(flag) + 1] = _PLACE
    for node, box in enumerate(launch.boxes[1:], 1):
        if tuple(str(node) if word == _PLACE else word for word in words) != box:
            raise Unsupported("the boxes' lines differ in more than their place: a LeaderWorkerSet has one for all")
    return tuple(words)


def _arguments(words: tuple[str, ...], service: Service) -> list[str]:
    return [_escaped(word) for word in (*words, *service.extra)]


def _escaped(word: str) -> str:
    if word == _PLACE:
        return word
    return placed(word.replace("$(", "$$("), lambda _: _ADDRESS)


def _container(launch: Launch, service: Service, arguments: list[str]) -> Document:
    program, *words = arguments
    environment: list[Document] = [
        {"name": name, "value": value} for name, value in {**launch.environment, **service.environment}.items()
    ]
    if not launch.local:
        secret = {"name": HF_SECRET, "key": "HF_TOKEN", "optional": True}
        environment.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": secret}})
    resource = RESOURCES.get(launch.vendor)
    found: Document = {
        "name": "engine",
        "image": service.image,
        "imagePullPolicy": "IfNotPresent",
        "command": [service.programs.get(program, program)],
        "args": words,
        "env": environment,
        "ports": [{"name": "http", "containerPort": service.port}],
        "volumeMounts": [
            {"name": "weights", "mountPath": _mount(launch), **({"readOnly": True} if launch.local else {})},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if len(launch.boxes) > 1 else {})},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if resource:
        found["resources"] = {"limits": {resource: str(launch.box_devices)}}
    if launch.local and launch.folder is None:
        found["workingDir"] = MODELS
    return found


def _mount(launch: Launch) -> str:
    return HUB_CACHE if not launch.local else launch.folder or MODELS


def _probes(service: Service, startup_s: int) -> Document:
    """Ready once it answers; until then it may take as long as its weights need."""
    asked = {"httpGet": {"path": service.health_path, "port": "http"}, "timeoutSeconds": 5}
    return {
        "startupProbe": {
            **asked,
            "periodSeconds": PROBE_PERIOD_S,
            "failureThreshold": -(-startup_s // PROBE_PERIOD_S),
        },
        "readinessProbe": {**asked, "periodSeconds": 10, "failureThreshold": 3},
        "livenessProbe": {**asked, "periodSeconds": 30, "failureThreshold": 6},
    }


def _pod(launch: Launch, container: Document) -> Document:
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # a Service called vllm would set VLLM_PORT
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": [
            {"name": "weights", "persistentVolumeClaim": {"claimName": f"{launch.name}-weights"}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
        ],
    }


def _service(launch: Launch, service: Service, several: bool) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": launch.name},
        "spec": {
            "type": "ClusterIP",
            "selector": {**_labels(launch), **({"qwenfit/role": "leader"} if several else {})},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }


def _volume(launch: Launch, several: bool) -> Document:
    size = -(-int(launch.weights_bytes * VOLUME_SHARE) // GIB)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": f"{launch.name}-weights"},
        "spec": {
            "accessModes": ["ReadWriteMany" if several else "ReadWriteOnce"],
            "resources": {"requests": {"storage": f"{size}Gi"}},
        },
    }
