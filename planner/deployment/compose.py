"""compose.yaml: the engine behind a gateway with keys, and the keys' database (https://compose-spec.io).

A `$` means something to compose, so those of the plan are doubled; what the person has to say comes from `.env`.
"""

from typing import Any

from .launch import Launch, placed
from .rpc_image import image_name
from .service import Service, services

HUB_CACHE = "/root/.cache/huggingface"
MODELS = "/models"
SHARED_MEMORY = "16gb"  # tensors that ranks hand each other on the host; vLLM's guide asks for the host's, --ipc=host
ENGINE_KEY = "${ENGINE_API_KEY:?see .env.example}"
INTERFACE = "${NCCL_SOCKET_IFNAME:?the network interface between the boxes}"
ASKS = "import urllib.request; urllib.request.urlopen('{url}', timeout=8)"
Document = dict[str, Any]


def literal(word: str) -> str:
    """As compose has to read it to mean this word."""
    return placed(word.replace("$", "$$"), lambda name: f"${{{name}:?see .env.example}}")


def compose(launch: Launch, service: Service, startup_s: int) -> Document:
    """The first box: engine, gateway, database. One command, `docker compose up -d`, starts them."""
    engine = engine_service(launch, service, startup_s, 0)
    if not launch.shares_network(0):
        engine["networks"] = ["serving"]
    return {
        "name": f"qwenfit-{launch.name}",
        "services": {"engine": engine, "gateway": _gateway_service(launch), "database": _database_service()},
        "networks": {"serving": {}, "keys": {"internal": True}},
        "volumes": {"database": {}, **({} if launch.local else {"huggingface": {}})},
    }


def box_compose(launch: Launch, service: Service, startup_s: int, node: int) -> Document:
    """Another box: its part of the engine, and nothing that a client could ask."""
    engine = engine_service(launch, service, startup_s, node)
    return {
        "name": f"qwenfit-{launch.name}-box-{node}",
        "services": {"engine": engine},
        **({} if launch.local else {"volumes": {"huggingface": {}}}),
    }


def _gateway_service(launch: Launch) -> Document:
    gateway, on_host = services()["gateway"], launch.shares_network(0)
    url = f"http://127.0.0.1:{gateway['port']}{gateway['health_path']}"
    return {
        "image": gateway["image"],
        "command": ["--config", "/app/config.yaml", "--port", str(gateway["port"])],
        "environment": {
            "LITELLM_MASTER_KEY": "${LITELLM_MASTER_KEY:?see .env.example}",
            "LITELLM_SALT_KEY": "${LITELLM_SALT_KEY:?see .env.example}",
            "DATABASE_URL": "postgresql://litellm:${POSTGRES_PASSWORD:?see .env.example}@database:5432/litellm",
            **({"ENGINE_API_KEY": ENGINE_KEY} if on_host else {}),
        },
        "volumes": ["./gateway.yaml:/app/config.yaml:ro"],
        "ports": [f"${{GATEWAY_ADDRESS:-127.0.0.1}}:${{GATEWAY_PORT:-{gateway['port']}}}:{gateway['port']}"],
        "depends_on": {
            "engine": {"condition": "service_healthy"},
            "database": {"condition": "service_healthy"},
        },
        "healthcheck": {
            "test": ["CMD", "python3", "-c", ASKS.format(url=url)],
            "interval": "30s",
            "timeout": "10s",
            "retries": 3,
            "start_period": "60s",
        },
        "networks": ["serving", "keys"],
        **({"extra_hosts": ["engine:host-gateway"]} if on_host else {}),
        **_careful(),
    }


def _database_service() -> Document:
    return {
        "image": services()["database"]["image"],
        "environment": {
            "POSTGRES_USER": "litellm",
            "POSTGRES_DB": "litellm",
            "POSTGRES_PASSWORD": "${POSTGRES_PASSWORD:?see .env.example}",
        },
        "volumes": ["database:/var/lib/postgresql/data"],
        "healthcheck": {
            "test": ["CMD", "pg_isready", "-U", "litellm", "-d", "litellm"],
            "interval": "10s",
            "timeout": "5s",
            "retries": 5,
        },
        "networks": ["keys"],
        **_careful(),
    }


def engine_service(launch: Launch, service: Service, startup_s: int, node: int) -> Document:
    """The engine in one box."""
    program, *words = launch.boxes[node]
    serves = node == 0
    found: Document = {
        **({"image": image_name(service), "build": "."} if launch.calls_boxes else {"image": service.image}),
        "entrypoint": [literal(service.programs.get(program, program))],
        "command": [literal(word) for word in [*words, *(service.extra if serves else ())]],
        "environment": {
            **{name: literal(value) for name, value in {**launch.environment, **service.environment}.items()},
            **({} if launch.local else {"HF_TOKEN": "${HF_TOKEN:-}"}),
        },
        "volumes": _volumes(launch),
        "shm_size": SHARED_MEMORY,
        "ulimits": {"memlock": -1, "stack": 67108864},
    }
    if launch.local and launch.folder is None:
        found["working_dir"] = MODELS
    found.update(_devices(launch))
    if launch.shares_network(node):
        _share_network(found, launch, service, node)
    elif serves:
        found["expose"] = [str(service.port)]
    found["healthcheck"] = {"disable": True}  # what another box runs answers no such question
    if serves:
        found["healthcheck"] = {
            "test": service.health_test,
            "interval": "30s",
            "timeout": "10s",
            "retries": 3,
            "start_period": f"{startup_s}s",
        }
    return {**found, **_careful()}


def _share_network(found: Document, launch: Launch, service: Service, node: int) -> None:
    """Boxes talk over the host's network, and over InfiniBand where there is any. What serves there asks for a key."""
    found["network_mode"] = "host"
    if launch.calls_boxes:
        found.pop("volumes")  # its weights come over the network
        found.pop("working_dir", None)
        return
    found["cap_add"] = ["IPC_LOCK"]
    found["environment"] |= {"NCCL_SOCKET_IFNAME": INTERFACE, "GLOO_SOCKET_IFNAME": INTERFACE}
    if launch.plan.setup.interconnect and launch.plan.setup.interconnect.rdma:
        found["devices"] = [*found.get("devices", []), "/dev/infiniband:/dev/infiniband"]
    if node == 0 and service.key_environment:
        found["environment"][service.key_environment] = ENGINE_KEY
    if node == 0 and service.key_flag:
        found["command"] += [service.key_flag, ENGINE_KEY]


def _volumes(launch: Launch) -> list[Document]:
    if not launch.local:
        return [{"type": "volume", "source": "huggingface", "target": HUB_CACHE}]
    if launch.folder is not None:
        path = literal(launch.folder)
        return [{"type": "bind", "source": path, "target": path, "read_only": True}]
    return [{"type": "bind", "source": "${MODELS_DIR:-./models}", "target": MODELS, "read_only": True}]


def _devices(launch: Launch) -> Document:
    """How a container gets its accelerators."""
    if launch.vendor == "nvidia":
        asked = {"driver": "nvidia", "count": launch.box_devices, "capabilities": ["gpu"]}
        return {"deploy": {"resources": {"reservations": {"devices": [asked]}}}}
    if launch.vendor == "amd":
        return {"devices": ["/dev/kfd:/dev/kfd", "/dev/dri:/dev/dri"], "group_add": ["video", "render"]}
    if launch.vendor == "intel":
        return {"devices": ["/dev/dri:/dev/dri"], "group_add": ["video", "render"]}
    return {}


def _careful() -> Document:
    return {
        "restart": "unless-stopped",
        "security_opt": ["no-new-privileges:true"],
        "logging": {"driver": "json-file", "options": {"max-size": "50m", "max-file": "5"}},
    }
