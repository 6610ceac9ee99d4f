"""What must stop a number: a kernel that is wrong, and, in CI, one that became slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.guard import Floors
from benchmarks.harness import Contest, Contestant, Timing, kernels_of, waits_of

REPOSITORY = Path(__file__).parent.parent
FLOORS = REPOSITORY / "benchmarks" / "floors.json"

# A plugin of pytest that is loaded before the benchmarks.
SLOW = """
import time
from detr_fast import HungarianMatcher

quick = HungarianMatcher.match_layers

def slow(*arguments, **more):
    time.sleep(0.02)
    return quick(*arguments, **more)

HungarianMatcher.match_layers = slow
"""
WRONG = """
from detr_fast.ops.matching.api import OP

implementation = OP.implementations[0]
right = implementation.run

def wrong(*arguments, **more):
    query_of_target, *rest = right(*arguments, **more)
    return query_of_target.flip(-1), *rest

object.__setattr__(implementation, "run", wrong)
"""


def timing(name: str, ratio: float) -> Timing:
    return Timing(name, (1 / ratio,), ratio, (ratio, ratio), 0)


def run_benchmarks(plugin: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "meddler.py").write_text(plugin)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "meddler"]
    command += [
        "benchmarks/bench_matching.py",
        "--benchmark",
        "--benchmark-quick",
        "--benchmark-device=cpu",
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment)


def test_a_ratio_below_its_share_of_what_was_measured_is_named():
    floors = Floors(0.5, {"matching": {"quick": 10.0}})
    timings = [timing("original", 1.0), timing("quick", 5.1), timing("other", 0.1)]
    assert floors.too_slow("matching", timings) == {}
    assert floors.too_slow("another contest", [timing("quick", 0.1)]) == {}
    (reason,) = floors.too_slow("matching", [timing("original", 1.0), timing("quick", 4.9)]).values()
    assert reason == (
        "matching: quick is 4.90 times as fast as original, the floor is 5.00 (0.5 of the 10.00 that were measured)"
    )


def test_a_busy_machine_makes_nobody_too_slow():
    """Two of three rounds took ten times as long as they need: the shortest ones count too."""
    floors = Floors(0.5, {"matching": {"quick": 10.0}})
    disturbed = Timing("quick", (0.2, 0.02, 0.2), 0.5, (0.5, 5.0), 0)
    assert floors.too_slow("matching", [timing("original", 1.0), disturbed]) == {}
    slow = Timing("quick", (0.21, 0.22, 0.21), 4.8, (4.7, 4.8), 0)
    assert list(floors.too_slow("matching", [timing("original", 1.0), slow])) == ["quick"]


def test_the_guard_holds_no_more_than_it_needs():
    contestants = [Contestant(name, int) for name in ("original", "peer", "quick")]
    contest = Contest(contestants, check=print, floors=[Contestant("floor: read", int)], parts=dict)
    needed = Floors(0.5, {"matching": {"quick": 10.0}}).needed("matching", contest)
    assert [contestant.name for contestant in needed.timed] == ["original", "quick"] and needed.parts is None


def test_a_floor_that_nothing_was_held_to_is_named():
    floors = Floors(0.5, {"matching": {"quick": 10.0, "absent": 3.0}, "loss": {"total": 2.0}})
    assert floors.unheld({"matching": [timing("quick", 9.0)]}) == ["matching: absent", "loss: total"]


def test_the_kept_floors_are_of_contestants_that_are_faster_than_the_original():
    floors = Floors.read(FLOORS)
    assert floors.measured
    assert all(floors.slack * ratio >= 1 for contest in floors.measured.values() for ratio in contest.values())


def test_a_contestant_that_became_slow_fails_the_guard(tmp_path):
    run = run_benchmarks(SLOW, tmp_path, "--benchmark-floors=benchmarks/floors.json", "-k", "coco-2-")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "matching coco-2: match_layers is 0." in run.stdout
    assert "1 failed" in run.stdout.splitlines()[-1]
    assert "1 passed" in run.stdout.splitlines()[-1], "the original alone: others have no floor"


def test_a_wrong_kernel_has_no_speed(tmp_path):
    pytest.importorskip("detr_fast._C", reason="needs the native module")
    results, theirs = tmp_path / "results.json", tmp_path / "theirs.json"
    files = (f"--benchmark-results={results}", f"--benchmark-json={theirs}")
    run = run_benchmarks(WRONG, tmp_path, *files, "-k", "coco-8")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "matching coco-8: refused" in run.stdout
    assert "is wrong, so no speed is given: " in run.stdout
    assert " ms " not in run.stdout, "a duration is shown"
    written = json.loads(results.read_text())
    assert written["contests"] == {} and set(written["refused"]) == {"matching coco-8"}
    assert not (theirs.exists() and theirs.read_text())


# In the place of Python: notes what it is called with, and fails in the piece that is to fail.
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in *MACHINE-masks.json*) exit 1 ;; esac
"""


def run_all(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    command = [str(REPOSITORY / "benchmarks" / "run_all.sh"), "MACHINE", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=environment)
    return run, (folder / "calls").read_text().splitlines()


def test_all_benchmarks_run_in_one_go_though_one_fails(tmp_path):
    run, calls = run_all(tmp_path)
    *measured, report = calls
    assert run.returncode == 1 and "failed: masks" in run.stderr and "seconds altogether" in run.stdout
    assert report.startswith("-m detr_fast bench-report --output benchmarks/results/report.html")
    for file in (REPOSITORY / "benchmarks").glob("bench_*.py"):
        assert any(f"benchmarks/{file.name} " in call for call in measured), f"{file.name} is in no piece"
    files = [call.split("--benchmark-results ")[1] for call in measured]
    assert len(set(files)) == len(files) and not any("quick" in call for call in measured)


def test_pieces_are_run_by_name(tmp_path):
    run, calls = run_all(tmp_path, "quick", "transformer")
    assert run.returncode == 0, run.stderr
    assert "pytest benchmarks/ --benchmark-quick --benchmark " in calls[0]
    assert "benchmarks/bench_transformer.py -k inference --benchmark " in calls[1] and len(calls) == 3
    assert run_all(tmp_path, "nothing")[0].returncode != 0


def test_kernels_and_waits_are_counted_from_a_trace_of_a_gpu():
    """Such as PyTorch writes: the profiler's own waits lie outside the counted part, a copy's wait inside."""

    def call(name: str, at: int, kind: str = "cuda_runtime") -> dict[str, object]:
        return {"cat": kind, "name": name, "ts": at, "dur": 1}

    events = [
        call("cudaDeviceSynchronize", 1),
        {"cat": "user_annotation", "name": "counted by the harness", "ts": 10, "dur": 50},
        {"cat": "gpu_user_annotation", "name": "counted by the harness", "ts": 12, "dur": 70},
        call("cudaLaunchKernel", 11),
        call("cuLaunchKernelEx", 13, "cuda_driver"),
        call("cudaMemcpyAsync", 20),
        call("cudaStreamSynchronize", 21),
        call("cudaEventSynchronize", 30),
        call("cudaDeviceSynchronize", 70),
        call("matching_fwd_kernel", 40, "kernel"),
        call("lsap_fwd_kernel", 80, "kernel"),
        {"name": "process_name", "ts": 0},
    ]
    assert waits_of(events) == 2
    assert kernels_of(events) == 2


def test_the_gpu_check_goes_through_its_stages_without_a_gpu(tmp_path):
    """The solver's, which is quick; the others build and measure."""
    pytest.importorskip("detr_fast._C", reason="needs the native module")
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    command = [str(REPOSITORY / "scripts" / "gpu_check.sh"), "--dry-run", "sanitize"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "memcheck, without it: exit code 0" in run.stdout
    assert "right" in (tmp_path / "sanitize.log").read_text()
    late = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment | {"STAGE_SECONDS": "0"}
    )
    assert late.returncode == 1 and "not run, the stage's time is used up" in late.stdout


def test_the_gpu_check_names_an_unknown_stage(tmp_path):
    command = [str(REPOSITORY / "scripts" / "gpu_check.sh"), "--dry-run", "sanitise"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | {"OUT": str(tmp_path)})
    assert run.returncode == 1 and "no such stage: sanitise" in run.stderr
