"""A Ray Serve configuration of vLLM over several boxes: `serve deploy ray-serve.yaml` on a running Ray cluster.

`ray.serve.llm` (Ray 2.60) starts vLLM's engine with `engine_kwargs`, which are the flags of the plan's line under the
names of vLLM's EngineArgs; Ray places the ranks, so what names boxes and addresses is left out.
"""

from json import loads
from typing import Any

from ...profiles.errors import Unsupported
from ..factors import family_of
from .launch import Launch
from .service import services

PLACES = ("--nnodes", "--node-rank", "--master-addr", "--data-parallel-size-local", "--data-parallel-address")


def ray_serve(launch: Launch) -> dict[str, Any]:
    """The whole file of `serve deploy`. Unsupported for another engine, and for replicas, which Ray has in another
    way."""
    plan = launch.plan
    if plan.engine != "vllm" or plan.dp > 1:
        raise Unsupported("Ray Serve's LLM configuration is written for vLLM with tensor and pipeline parallelism")
    config: dict[str, Any] = {
        "model_loading_config": {"model_id": launch.name, "model_source": launch.model},
        "engine_kwargs": engine_arguments(launch.boxes[0]),
        "deployment_config": {"num_replicas": 1, "max_ongoing_requests": max(8, 2 * plan.seqs)},
    }
    accelerator = services()["ray_accelerators"].get(plan.setup.devices[0].name) or services()["ray_accelerators"].get(
        family_of(plan.setup.devices[0])
    )
    if accelerator:
        config["accelerator_type"] = accelerator
    if launch.environment:
        config["runtime_env"] = {"env_vars": dict(launch.environment)}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": launch.name,
                "route_prefix": "/",
                "import_path": "ray.serve.llm:build_openai_app",
                "args": {"llm_configs": [config]},
            }
        ],
    }


def engine_arguments(words: tuple[str, ...]) -> dict[str, Any]:
    """`vllm serve MODEL --max-model-len 8 --no-enable-x` -> {max_model_len: 8, enable_x: False}."""
    found: dict[str, Any] = {}
    place = 3
    while place < len(words):
        flag, value = words[place], words[place + 1] if place + 1 < len(words) else "--"
        place += 1
        if value.startswith("--"):  # a switch
            if flag == "--headless":
                continue
            name = flag.removeprefix("--").replace("-", "_")
            found[name.removeprefix("no_")] = not name.startswith("no_")
            continue
        place += 1
        if flag not in PLACES:
            found[flag.removeprefix("--").replace("-", "_")] = _typed(value)
    return found


def _typed(value: str) -> Any:
    """Numbers and JSON as what they are; anything else is text."""
    try:
        return loads(value)
    except ValueError:
        return value
