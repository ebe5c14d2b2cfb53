"""The gateway's configuration and what monitors the engine.

LiteLLM's proxy (https://docs.litellm.ai/docs/proxy/configs): one model, `os.environ/NAME` for every secret, limits for
each key that is made, checks of the engine's health in the background.
"""

from typing import Any

from .launch import Launch
from .service import Service

REQUESTS_PER_MINUTE = 60  # of a key that is made without saying; `/key/generate` takes another
TIMEOUT_S = 3600  # a long prompt on a slow machine takes that long to its first token


def gateway(launch: Launch, service: Service) -> dict[str, Any]:
    """Requests beyond what the plan has room for wait in the engine; a key gets no more of it than all of that."""
    seqs = launch.plan.seqs
    limits = {"rpm_limit": REQUESTS_PER_MINUTE, "max_parallel_requests": seqs}
    return {
        "model_list": [
            {
                "model_name": launch.name,
                "litellm_params": {
                    "model": f"hosted_vllm/{launch.model}",
                    "api_base": f"http://engine:{service.port}/v1",
                    **({"api_key": "os.environ/ENGINE_API_KEY"} if launch.shares_network(0) else {}),
                    "timeout": TIMEOUT_S,
                    "stream_timeout": TIMEOUT_S,
                },
                "model_info": {"mode": "chat", "max_input_tokens": launch.plan.ctx_tokens},
            }
        ],
        "litellm_settings": {
            "drop_params": True,
            "default_key_generate_params": limits,
            "upperbound_key_generate_params": {"max_parallel_requests": seqs},
        },
        "general_settings": {
            "master_key": "os.environ/LITELLM_MASTER_KEY",
            "database_url": "os.environ/DATABASE_URL",
            "background_health_checks": True,
            "health_check_interval": 60,
        },
    }


def prometheus(launch: Launch, service: Service) -> dict[str, Any]:
    """A scrape configuration, to be loaded as it is or taken over by one that is there."""
    return {
        "global": {"scrape_interval": "15s"},
        "scrape_configs": [
            {
                "job_name": "qwenfit-engine",
                "metrics_path": service.metrics_path,
                "static_configs": [
                    {
                        "targets": [f"engine:{service.port}"],
                        "labels": {"model": launch.name, "engine": launch.plan.engine},
                    }
                ],
            }
        ],
    }
