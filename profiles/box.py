"""The devices of one box, as `--gpu` takes them."""

import os

from .device import Device
from .device_names import device, devices_in, is_name, is_path
from .errors import BadInput
from .names import quote

MAX_DEVICES = 1024
MAX_SPEC_CHARACTERS = 16384


def devices_of(spec: str) -> tuple[Device, ...]:
    """The devices of one box, as `--gpu` takes them: `rtx3090`, `2xrtx3090`, `rtx4090,rtx3060`, `2xrtx3090,my.yaml`.

    `auto` stands for this machine; a file may hold several devices.

    `BadInput` for an empty part or a count outside 1 to 1024, and whatever `device` says of a name or a file.
    """
    if is_name(spec):  # the common case, at once
        return (device(spec),)
    if spec.strip().lower() == "auto":
        from .this_machine import this_machine

        return this_machine()
    if len(spec) > MAX_SPEC_CHARACTERS:
        raise BadInput(
            f"a list of devices of {len(spec)} characters is too long; at most {MAX_DEVICES} devices fit a box"
        )
    found: list[Device] = []
    for part in [spec] if is_path(spec) and _exists(spec) else spec.split(","):
        count, name = _count_and_name(part.strip(), spec)
        named = devices_in(name) if len(found) + count <= MAX_DEVICES else ()
        if len(found) + count * max(1, len(named)) > MAX_DEVICES:
            raise BadInput(f"{quote(spec)} asks for more than {MAX_DEVICES} devices")
        found += named * count
    return tuple(found)


def _count_and_name(part: str, spec: str) -> tuple[int, str]:
    """("2xrtx3090") -> (2, "rtx3090"). A name may begin or end with an x: only a number before the first x counts."""
    if not part:
        where = "is empty" if not spec.strip() else f"has an empty part: {quote(spec)}"
        raise BadInput(f"the list of devices {where}; write a name such as rtx3090, or 2xrtx3090,rtx4090")
    if is_path(part) and _exists(part):
        return 1, part
    before, x, name = part.replace("×", "x").replace("X", "x", 1).partition("x")
    number = before.strip().removeprefix("-").removeprefix("+")
    if not x or not number.isascii() or not number.isdigit():
        return 1, part
    name = part[len(before) + 1 :].strip()
    if not name:
        raise BadInput(f"{quote(part)}: a device's name must follow the x, as in 2xrtx3090")
    if "-" in before or len(number) > 9 or not 1 <= int(number) <= MAX_DEVICES:
        raise BadInput(f"{quote(part)}: the number of devices must lie between 1 and {MAX_DEVICES}")
    return int(number), name


def _exists(path: str) -> bool:
    return "\0" not in path and os.path.exists(os.path.expanduser(path))
