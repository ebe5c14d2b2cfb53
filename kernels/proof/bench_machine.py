"""The machine that a bench ran on, as its report names it: device, driver, versions, clocks."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Any

import torch

PACKAGES = ("qwenfit", "torch", "triton", "gemlite", "torchao", "vllm", "flash-linear-attention", "flashinfer-python")


def machine() -> dict[str, Any]:
    """When, where, with what: for the head of a report."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": {"python": platform.python_version(), "system": platform.platform(), "cpu": platform.processor()},
        "device": _device(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"name": "cpu"}
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": found.name,
        "architecture": getattr(found, "gcnArchName", "") if torch.version.hip else f"sm_{found.major}{found.minor}",
        "processors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cache_bytes": found.L2_cache_size,
        "runtime": torch.version.hip or torch.version.cuda,
        **_driver(),
        **clocks(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> dict[str, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        return {"driver": pynvml.nvmlSystemGetDriverVersion()}
    except Exception as error:  # ROCm, or no permission: the report says so
        return {"driver": f"{type(error).__name__}: {error}"}


def clocks() -> dict[str, Any]:
    """Clocks, power, temperature and what holds the clocks back, by NVML; {} where there is none (ROCm)."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        return {
            "sm_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
            "memory_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "temperature_c": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
            "throttle_reasons": hex(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        }
    except Exception as error:  # another driver, no permission, a device that NVML does not know: not worth failing for
        return {"nvml": f"{type(error).__name__}: {error}"}
