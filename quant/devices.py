"""Whether torch has the device that was asked for."""

import torch

from ..profiles.errors import Unsupported


def check_device(name: str) -> None:
    """`Unsupported` in one sentence for a name that is no device, or one that is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise Unsupported(
            f"--device {name}: torch has no such device here ({reason}); leave it out for the CPU"
        ) from error
