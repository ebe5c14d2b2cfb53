"""Names that the shell completes: devices, models, engines, formats. Catalogs only, nothing that is slow to import."""

from collections.abc import Callable, Iterable

from .options import FORMATS

Names = Iterable[tuple[str, str]]  # a name and a word about it


def devices() -> Names:
    from ..profiles.device_names import devices as catalog

    yield "auto", "this machine"
    for device in catalog():
        yield device.name, device.title


def models() -> Names:
    from ..profiles.model_catalog import models as catalog

    for model in catalog():
        yield model.name, model.repo


def engines() -> Names:
    from ..planner.candidates import ENGINE_MODULES

    return ((name, "") for name in ENGINE_MODULES)


def kv_dtypes() -> Names:
    from ..planner.quality import KV_DIVERGENCE

    return ((name, "") for name in KV_DIVERGENCE)


def state_dtypes() -> Names:
    from ..planner.quality import STATE_DIVERGENCE

    return ((name, "") for name in STATE_DIVERGENCE)


def weights() -> Names:
    from ..profiles.formats import formats as catalog

    return ((known.name, known.title) for known in catalog())


def interconnects() -> Names:
    from ..profiles.interconnect import interconnects as catalog

    return ((row["name"], row["title"]) for row in catalog())


def formats() -> Names:
    return ((name, "") for name in FORMATS)


LISTS: dict[str, Callable[[], Names]] = {
    "devices": devices,
    "models": models,
    "engines": engines,
    "weights": weights,
    "kv_dtypes": kv_dtypes,
    "state_dtypes": state_dtypes,
    "interconnects": interconnects,
    "formats": formats,
}


def completer(kind: str) -> Callable[[str], list[tuple[str, str]]]:
    """A function for Typer: what may stand where `incomplete` stands."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before, wanted = _last(incomplete) if kind == "devices" else ("", incomplete)
        return [(before + name, about) for name, about in LISTS[kind]() if name.startswith(wanted.lower())]

    return complete


def _last(devices: str) -> tuple[str, str]:
    """What is settled and what is still being typed: `rtx3090,2xrtx4` is `rtx3090,2x` and `rtx4`."""
    head, comma, name = devices.rpartition(",")
    number, times, rest = name.partition("x")
    if times and number.isdigit():
        return f"{head}{comma}{number}{times}", rest
    return f"{head}{comma}", name
