"""`qwen-quant --bits 8` beside the same reading and writing without computing: is rounding limited by the disk?

    python tests/bench/synthetic_checkpoint.py 9b path/to/config.json 9b
    python tests/bench/rounding_disk.py 9b [--rounds 3]

Turn and turn about: a plain program that reads the shards in blocks of 16 MB, one ahead, and writes as many bytes as
the result has, synced as it goes; then the command, from its start to its end. Nothing is cached when either begins,
everything is on the disk when it ends. CPU seconds are user + system. Other work on the machine slows both, and not
alike: quote the ratios and say how many rounds there were.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from qwenfit.quant import Recipe
from qwenfit.quant.pipeline import sizes
from qwenfit.quant.tasks import Aside, one_ahead

BLOCK_BYTES, SYNC_BYTES = 16 << 20, 400_000_000


def copy(shards: list[Path], target: Path, size_bytes: int) -> None:
    """Reads every shard, writes the beginning of each block until `size_bytes` are evenly reached."""
    whole_bytes = sum(path.stat().st_size for path in shards)
    ring = [bytearray(BLOCK_BYTES) for _ in range(3)]

    def places() -> Iterator[tuple[int, int, int]]:
        number = 0
        for path in shards:
            file = os.open(path, os.O_RDONLY)
            for at in range(0, path.stat().st_size, BLOCK_BYTES):
                yield file, at, number
                number += 1
            os.close(file)

    def block(place: tuple[int, int, int]) -> memoryview:
        file, at, number = place
        view = memoryview(ring[number % 3])
        return view[: os.preadv(file, [view], at)]

    out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(out, 0, size_bytes)
    read_bytes = position = synced = 0
    with Aside() as syncing:
        for data in one_ahead(block, places()):
            read_bytes += len(data)
            upto = size_bytes * read_bytes // whole_bytes
            while position < upto:
                position += os.pwrite(out, data[: upto - position], position)
            if position - synced > SYNC_BYTES and syncing.is_free():
                syncing.start(os.fdatasync, out)
                synced = position
    os.fsync(out)


def forget(folder: Path) -> None:
    """Has the system drop what it has cached of these files."""
    for path in folder.iterdir():
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def took(words: list[str], source: Path) -> tuple[float, float]:
    """(seconds, CPU seconds) of a command that finds nothing of `source` cached."""
    os.sync()
    forget(source)
    before, began_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.monotonic() - began_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copy", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    source = chosen.source.resolve()
    if chosen.copy:
        copy(sorted(source.glob("*.safetensors")), Path(chosen.copy[0]), int(chosen.copy[1]))
        return
    size_bytes = sizes(str(source), Recipe(bits=8)).bytes
    alone, rounded = [], []
    for _ in range(chosen.rounds):
        with tempfile.TemporaryDirectory(dir=source.parent) as folder:
            plain = [__file__, str(source), "--copy", os.path.join(folder, "plain"), str(size_bytes)]
            alone.append(took(plain, source))
            os.remove(os.path.join(folder, "plain"))
            target = os.path.join(folder, "int8")
            rounded.append(took(["-m", "qwenfit.cli.quant", str(source), target, "--bits", "8"], source))
            shutil.rmtree(target)
        for name, (seconds, cpu_s) in (("read and written", alone[-1]), ("--bits 8", rounded[-1])):
            print(f"{name:17s} {seconds:6.1f} s {cpu_s:6.1f} CPU-s", flush=True)
    for name, of in (("least", min), ("median", median)):
        disk_s, command_s = (of([seconds for seconds, _ in one]) for one in (alone, rounded))
        print(f"{name}: {disk_s:.1f} and {command_s:.1f} s, {command_s / disk_s:.2f} times")


if __name__ == "__main__":
    main()
