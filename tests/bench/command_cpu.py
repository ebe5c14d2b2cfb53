"""CPU seconds of the whole `qwen-plan` process, and how many bare Pythons that is.

    python tests/bench/command_cpu.py [-n 15] [-- any other command]

The installed command is measured as people call it, console script included; runs of a bare `python -c pass` lie
between its own, so that a busy machine slows both. Budget: 0.15 s where a bare Python takes 0.02 s.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys

QUESTION = ["qwen-plan", "--gpu", "rtx3060", "--ctx", "262144"]
BARE = [sys.executable, "-c", "pass"]


def cpu_s(command: list[str]) -> float:
    """User and system time of one run, from the kernel's account of that process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)} left with {process.returncode}")
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of the whole qwen-plan process.")
    parser.add_argument("-n", type=int, default=15, help="runs (default 15)")
    parser.add_argument("command", nargs="*", default=QUESTION)
    asked = parser.parse_args()
    program = shutil.which(asked.command[0]) or sys.exit(f"{asked.command[0]} is not installed")
    command = [program, *asked.command[1:]]
    cpu_s(command)  # byte code and file cache
    runs = [(cpu_s(command), cpu_s(BARE)) for _ in range(asked.n)]
    whole, bare = (statistics.median(times) for times in zip(*runs, strict=True))
    fastest = min(time for time, _ in runs)
    print(f"{' '.join(asked.command)}: {whole:.3f} s CPU (median of {asked.n}, fastest {fastest:.3f})")
    print(f"python -c pass: {bare:.3f} s; ratio {whole / bare:.1f}")


if __name__ == "__main__":
    main()
