"""What a number was measured on: machine, versions, commit and command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("detr_fast", "torch", "triton", "numpy", "scipy", "transformers")


def busy_seconds() -> float | None:
    """Of all cores and processes since the system started, or None where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _waiting, interrupts, more_interrupts, stolen = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + interrupts + more_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Of processor time, this process's and that of its children that have ended."""
    return sum(os.times()[:4])


STARTED, BUSY_BEFORE, OWN_BEFORE = time.monotonic(), busy_seconds(), own_seconds()


@cache
def describe() -> dict[str, str]:
    """Everything that a row of results needs beside it, as text."""
    return {
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "commit": commit(),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
    }


def elapsed_seconds() -> int:
    """Since the benchmarks were read."""
    return round(time.monotonic() - STARTED)


def cores_of_others() -> float | None:
    """How many cores other processes kept busy since the benchmarks were read, on average: beyond a tenth of one, what
    was measured meanwhile is of a busy machine. None where the system does not tell."""
    busy = busy_seconds()
    if busy is None or BUSY_BEFORE is None:
        return None
    others = busy - BUSY_BEFORE - (own_seconds() - OWN_BEFORE)
    return round(max(0.0, others) / (time.monotonic() - STARTED), 2)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str:
    """The installed version, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The checkout's commit, with "+ changes" where code differs from it; "unknown" outside of a checkout.

    Results and the README, which a run of all benchmarks writes, do not count.
    """
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results", ":!/*.md")
        return git("rev-parse", "--short=12", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def git(*arguments: str) -> str:
    """What git says of this checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
