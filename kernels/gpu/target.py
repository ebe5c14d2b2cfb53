"""What a kernel is compiled for: the architectures, and the limits of each that a compiled kernel must keep."""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """An architecture as Triton names it.

    shared_bytes: most that one program may ask for (CUDA: opt-in maximum per block; ROCm: LDS of a compute unit).
    matrix_instruction: what `tl.dot` must become, as the start of the mnemonic; None where Triton has no matrix unit.
    """

    name: str
    backend: str
    warp_threads: int
    shared_bytes: int
    matrix_instruction: str | None
    source: str

    @property
    def triton_arch(self) -> int | str:
        """sm_90 is 90 to Triton, gfx942 is itself."""
        return int(self.name.removeprefix("sm_")) if self.backend == "cuda" else self.name

    @property
    def capability(self) -> int:
        """Compute capability times ten; 0 for ROCm."""
        return int(self.name.removeprefix("sm_")) if self.backend == "cuda" else 0


_CUDA = "CUDA C++ Programming Guide, table of technical specifications per compute capability"
_ROCM = "AMD ISA guides: LDS per workgroup"
TARGETS = (
    Target("sm_75", "cuda", 32, 64 * KIB, None, _CUDA + "; Triton has no tensor cores below 8.0 since 3.3"),
    Target("sm_80", "cuda", 32, 163 * KIB, "HMMA", _CUDA),
    Target("sm_86", "cuda", 32, 99 * KIB, "HMMA", _CUDA),
    Target("sm_89", "cuda", 32, 99 * KIB, "HMMA", _CUDA),
    Target("sm_90", "cuda", 32, 227 * KIB, "HGMMA", _CUDA),
    Target("sm_100", "cuda", 32, 227 * KIB, "UTCHMMA", _CUDA),
    Target("sm_120", "cuda", 32, 99 * KIB, "HMMA", _CUDA),
    Target("gfx942", "hip", 64, 64 * KIB, "v_mfma", _ROCM),
    Target("gfx950", "hip", 64, 160 * KIB, "v_mfma", _ROCM),
    Target("gfx1100", "hip", 32, 64 * KIB, "v_wmma", _ROCM),
    Target("gfx1201", "hip", 32, 64 * KIB, "v_wmma", _ROCM),
)
_BY_NAME = {target.name: target for target in TARGETS}
INTERPRETED = _BY_NAME["sm_80"]  # whose configurations the interpreter runs


def target(name: str) -> Target:
    """The target of that name; ValueError with the known ones otherwise."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(f"no compile target {name!r}: one of {', '.join(_BY_NAME)}") from None


def target_of(device: "object") -> Target:
    """The target whose configurations a torch device takes: its own, or the nearest older one of its maker."""
    import torch

    device = torch.device(device)  # type: ignore[arg-type]
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return _BY_NAME.get(name) or _BY_NAME["gfx942" if name.startswith("gfx9") else "gfx1100"]
    capability = properties.major * 10 + properties.minor
    if capability < TARGETS[0].capability:
        raise ValueError(
            f"{properties.name} has compute capability {capability / 10}: the kernels start at 7.5 (Turing)"
        )
    return max((t for t in TARGETS if t.backend == "cuda" and t.capability <= capability), key=lambda t: t.capability)
