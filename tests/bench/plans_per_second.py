"""Plans per second and core through the Python API: every device x model x six contexts x format x engine.

    python tests/bench/plans_per_second.py [--devices rtx] [--models 9b] [--seconds 60]

A plan is one `plan(Request(...))` for one engine and one weight format that this engine tries on that device, down to
whether it fits. Combinations that an engine refuses are asked too; they take time and are no plans. Budget: 5,000 a
second.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator

from qwenfit.planner import Request, plan
from qwenfit.planner.candidates import ENGINE_MODULES, engine_module
from qwenfit.profiles import devices, models
from qwenfit.profiles.errors import QwenfitError

CONTEXTS = (4096, 32768, 131072, 262144, 524288, 1010000)


def requests(device_words: str, model_words: str) -> Iterator[Request]:
    for device in devices():
        for model in models():
            if device_words not in device.name or model_words not in model.name:
                continue
            for engine in ENGINE_MODULES:
                for weights in engine_module(engine).weight_formats(model, device):
                    for ctx_tokens in CONTEXTS:
                        yield Request(model.name, (device.name,), ctx_tokens, engine=engine, weights=weights)


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans per second and core, through the Python API.")
    parser.add_argument("--devices", default="", help="only devices with this in their name")
    parser.add_argument("--models", default="", help="only models with this in their name")
    parser.add_argument("--seconds", type=float, default=60, help="stop after so many (default 60)")
    asked = parser.parse_args()
    counts: Counter[str] = Counter()
    began_s = time.process_time()
    for request in requests(asked.devices, asked.models):
        try:
            answer = plan(request)
            counts["fits" if answer.fits else "does not fit"] += 1
        except QwenfitError:
            counts["refused"] += 1
        if counts.total() % 256 == 0 and time.process_time() - began_s > asked.seconds:
            break
    spent_s = time.process_time() - began_s
    planned = counts["fits"] + counts["does not fit"]
    print(f"{planned:,} plans in {spent_s:.1f} s CPU: {planned / spent_s:,.0f} a second and core")
    print(f"fits {counts['fits']:,}, does not fit {counts['does not fit']:,}; refused besides {counts['refused']:,}")


if __name__ == "__main__":
    main()
