"""How much memory this process has had at most: on a GPU what torch's allocator says, on a CPU what the kernel says."""

import os
import sys

import torch

_STATUS, _CLEAR = "/proc/self/status", "/proc/self/clear_refs"


def used_bytes(device: torch.device) -> int:
    """Bytes in use now: tensors on the GPU, or resident pages of the process (the peak where only that is known)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS") or peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes in use at once since `restart_peak`, or since the start where the peak cannot be restarted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM") or _most_resident_bytes()


def driver_bytes(device: torch.device) -> int | None:
    """Bytes that the GPU's driver counts for this process now: allocator, context, kernels. None where nobody says."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        # A handle by UUID: torch numbers the devices that CUDA_VISIBLE_DEVICES leaves, NVML all of them.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
        used = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return int(used[0]) if used and used[0] else None
    except Exception:  # no NVML, an old torch without UUIDs, a container with process numbers of its own
        return None


def restart_peak(device: torch.device) -> None:
    """Peaks count from now on. Linux keeps one per process, and "5" in clear_refs lowers it to what is in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open(_CLEAR, "w") as file:
            file.write("5")
    except OSError:
        pass  # another system, or a container that does not allow it: the peak is then that of the whole process


def _most_resident_bytes() -> int:
    if sys.platform == "win32":
        return 0  # no such count in Python's library
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status_bytes(name: str) -> int:
    try:
        with open(_STATUS) as file:
            lines = [line for line in file if line.startswith(name + ":")]
    except OSError:
        return 0
    return int(lines[0].split()[1]) * 1024 if lines else 0
