"""CPU seconds and peak memory of the first layers of a large checkpoint, as `qwen-quant --bits 4` quantizes them.

    python tests/bench/synthetic_checkpoint.py 9b path/to/config.json 9b
    python tests/bench/first_layers.py 9b --layers 8 [--max-ram-gb 4] [--gptaq]

The defaults of the command (8,192 calibration tokens); stopped behind the last of these layers, and the result is
deleted. Seconds are user + system of the whole process, so that other work on the machine hardly counts.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

from qwenfit.quant import Recipe, quantize
from qwenfit.quant.recorder import Progress


class Enough(Exception):
    """The layers that were asked for are done."""


class Clock:
    """Prints what each layer took. -1 is all up to the first solved module; a layer ends with the first of the next."""

    def __init__(self, layers: int) -> None:
        self.layers, self.layer = layers, -1
        self.began_s, self.began_cpu_s = time.monotonic(), time.process_time()

    def watch(self, progress: Progress) -> None:
        if progress.layer == self.layer:
            return
        now_s, cpu_s = time.monotonic(), time.process_time()
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(
            f"layer {self.layer:2d}: {cpu_s - self.began_cpu_s:6.1f} CPU-s {now_s - self.began_s:6.1f} s, "
            f"peak so far {peak_bytes / 1e9:.2f} GB",
            flush=True,
        )
        self.layer, self.began_s, self.began_cpu_s = progress.layer, now_s, cpu_s
        if progress.layer >= self.layers:
            raise Enough


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--max-ram-gb", type=float)
    parser.add_argument("--gptaq", action="store_true")
    chosen = parser.parse_args()
    source = chosen.source.resolve()
    recipe = Recipe(bits=4, full_precision_targets=True) if chosen.gptaq else Recipe(bits=4)
    most_bytes = None if chosen.max_ram_gb is None else int(chosen.max_ram_gb * 1e9)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        try:
            watch = Clock(chosen.layers).watch
            quantize(str(source), f"{folder}/out", recipe, max_ram_bytes=most_bytes, watch=watch)
        except Enough:
            print("stopped")


if __name__ == "__main__":
    main()
