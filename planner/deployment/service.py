"""What is started for an engine: image, port, paths (services.yaml)."""

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ...profiles.errors import Unsupported
from ...profiles.frozen import dataclass
from ...profiles.names import join_or

FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "services.yaml")


@dataclass(frozen=True, slots=True)
class Service:
    """An engine as a container runs it."""

    engine: str
    image: str  # pinned by the engine's version
    port: int
    health_path: str
    metrics_path: str
    extra: tuple[str, ...]  # words behind the plan's line
    environment: Mapping[str, str]
    programs: Mapping[str, str]  # where the image keeps a program, or what it calls it, where the line does not say so
    key_environment: str | None  # the variable that makes the engine ask for a key
    key_flag: str | None  # or the flag that does
    documentation: str
    health: str  # what asks for the health inside the image: python3 or curl

    @property
    def health_test(self) -> list[str]:
        """The test of a compose health check."""
        url = f"http://127.0.0.1:{self.port}{self.health_path}"
        if self.health == "curl":
            return ["CMD", "curl", "-fsS", "-o", "/dev/null", url]
        return ["CMD", "python3", "-c", f"import urllib.request; urllib.request.urlopen('{url}', timeout=8)"]


def service(engine: str, version: str, vendor: str) -> Service:
    """Unsupported, in a sentence, where no image is known."""
    known = services()["engines"]
    if engine not in known:
        raise Unsupported(f"no container of {engine} is known: plan with --engine {join_or([*known])}")
    row = known[engine]
    if vendor not in row["images"]:
        raise Unsupported(f"no {engine} image for {vendor} devices is known: there are {', '.join(row['images'])}")
    image = row["images"][vendor]
    parts = [*version.split("."), "0", "0"][: row["version_parts"]] if row["version_parts"] > 1 else [version]
    return Service(
        engine=engine,
        image=f"{image['name']}:{image['tag'].format(version='.'.join(parts))}",
        port=row["port"],
        health_path=row["health_path"],
        metrics_path=row["metrics_path"],
        extra=tuple(row["extra"]),
        environment=row["environment"],
        programs=row.get("program", {}),
        key_environment=row.get("key_environment"),
        key_flag=row.get("key_flag"),
        documentation=row["documentation"],
        health=row["health"],
    )


@lru_cache
def services() -> dict[str, Any]:
    """The file, as it stands there."""
    import yaml

    with open(FILE, encoding="utf-8") as file:
        return yaml.safe_load(file)
