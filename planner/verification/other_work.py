"""How much of the processors' time other work took meanwhile: what explains a slow run on a machine that was not idle.

Linux tells it in /proc/stat, in ticks since boot: what all processes took, and what the host of a virtual machine gave
to somebody else although work was there (`steal`). Elsewhere nothing is known.
"""

import os
from pathlib import Path

NOTED_SHARE = 0.1  # below it nobody is told: a system has work of its own
STAT = Path("/proc/stat")
STAT_LIMIT_BYTES = 4096  # of which the first line is read


class OtherWork:
    """Counts from its making on."""

    def __init__(self, stat: Path = STAT) -> None:
        self._stat = stat
        self._start = _spent(stat), _own_s()

    def share(self) -> float | None:
        """Of all processors' time since: neither idle, nor this process's and its ended children's. None where the
        system does not say."""
        before, after = self._start[0], _spent(self._stat)
        if before is None or after is None or after[1] <= before[1]:
            return None
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        busy, total = (later - earlier for earlier, later in zip(before, after, strict=True))
        return max(0.0, busy - (_own_s() - self._start[1]) * ticks_per_s) / total


def noted(share: float | None) -> str | None:
    """The sentence for people, where there is something to say."""
    if share is None or share < NOTED_SHARE:
        return None
    return (
        f"other work, here or beside a virtual machine on its host, took {share:.0%} of the processors' time: speeds "
        "are those of a busy machine"
    )


def _own_s() -> float:
    return sum(os.times()[:4])  # user and system, of this process and of its ended children


def _spent(stat: Path) -> tuple[int, int] | None:
    """Ticks that were not idle, and all of them: user, nice, system, idle, iowait, irq, softirq, steal (proc(5))."""
    try:
        with stat.open("rb") as file:
            name, *numbers = file.read(STAT_LIMIT_BYTES).split(b"\n", 1)[0].split()[:9]
        ticks = [int(number) for number in numbers]
    except (OSError, ValueError):
        return None
    if name != b"cpu" or len(ticks) < 4:
        return None
    idle = sum(ticks[3:5])
    return sum(ticks) - idle, sum(ticks)
