"""The benchmark harness: it refuses wrong contestants, and its numbers are what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, machine, original
from benchmarks.harness import Contest, Contestant, WrongResult, compare
from benchmarks.shapes import MATCHING_SHAPES, Shape

REPOSITORY = Path(__file__).parent.parent
SMALL = Shape("small", (3, 0, 5), num_queries=7, num_classes=4, num_layers=2)


def exactly_four(result: int) -> None:
    assert result == 4, f"expected 4, got {result}"


def test_a_wrong_contestant_is_named_and_nothing_is_timed():
    calls = []

    def right():
        calls.append("right")
        return 4

    contest = Contest([Contestant("right", right), Contestant("wrong", lambda: 5)], exactly_four)
    with pytest.raises(WrongResult, match="wrong is wrong, so no speed is given: expected 4, got 5"):
        compare(contest)
    assert calls == ["right"]


def test_a_contestant_that_fails_is_refused_with_its_reason():
    def broken():
        raise RuntimeError("no such kernel")

    with pytest.raises(WrongResult, match="broken is wrong.*no such kernel"):
        compare(Contest([Contestant("broken", broken)], exactly_four))


def test_ratio_is_to_the_first_contestant_and_rounds_are_bounded():
    def sleeper(seconds):
        return lambda: time.sleep(seconds) or 4

    slow, fast = compare(
        Contest([Contestant("slow", sleeper(0.02)), Contestant("fast", sleeper(0.002))], exactly_four),
        seconds_each=0.1,
        min_rounds=3,
    )
    assert (slow.name, fast.name) == ("slow", "fast")
    assert slow.ratio == 1.0
    assert fast.ratio > 2
    assert fast.ratio_spread[0] <= fast.ratio <= fast.ratio_spread[1]
    assert slow.spread[0] <= slow.median <= slow.spread[1]
    assert 3 <= len(slow.seconds) == len(fast.seconds) <= 6


def test_short_calls_are_repeated_and_floors_are_timed_but_not_checked(monkeypatch):
    monkeypatch.setattr(harness, "REST", 0.0)
    calls = []
    contest = Contest(
        [Contestant("quick", lambda: calls.append("quick") or 4)],
        exactly_four,
        floors=[Contestant("floor", lambda: calls.append("floor") or time.sleep(1e-3))],
    )
    quick, floor = compare(contest, seconds_each=0.0, min_rounds=2)
    assert len(quick.seconds) == len(floor.seconds) == 2
    assert calls.count("quick") > 500 > calls.count("floor")
    assert quick.median < 1e-4 < 1e-3 <= floor.median
    assert quick.floor_share == pytest.approx(floor.median / quick.median)
    assert floor.floor_share is None


def test_contestants_take_turns(monkeypatch):
    calls = []
    contestants = [Contestant(name, lambda name=name: calls.append(name)) for name in "abc"]
    harness.take_turns(Contest(contestants, exactly_four), rounds=8)
    assert calls[::2] == calls[1::2], "each is called once without being timed"
    rounds = [calls[i : i + 6 : 2] for i in range(0, 48, 6)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1, "the order never changed"


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.rand(2**18)

    assert harness.peak_memory(lambda: x + 1) == pytest.approx(2**20, rel=0.01)
    assert harness.peak_memory(lambda: torch.stack([x + 1, x + 2])) == pytest.approx(4 * 2**20, rel=0.01)


def test_peak_memory_counts_what_the_native_module_takes():
    pytest.importorskip("detr_fast._C", reason="needs the native module")
    from detr_fast.ops import assignment, attention
    from detr_fast.ops.attention import TokenOffsets

    cost = torch.rand(1, 400, 300)
    found = harness.peak_memory(lambda: assignment(cost, [300], backend="native"))
    assert 300 * 8 <= found < 2**20, "the result, and what the solver works in"
    assert harness.peak_memory(lambda: assignment(cost, [300], backend="native")) == found, "though its memory is kept"
    offsets = TokenOffsets.of([2048], "cpu")
    query, key, value, grad = (torch.rand(2048, 8, 32) for _ in range(4))
    query.requires_grad_()
    attended = attention(query, key, value, offsets, offsets, backend="native")
    gradient = (
        2048 * 8 * 32 * 4
    )  # bytes of one; a part of the keys has query gradients of its own, before they are added
    found = harness.peak_memory(lambda: torch.autograd.grad(attended, query, grad, retain_graph=True))
    assert found >= 4 * gradient


def test_a_result_given_back_during_a_count_was_taken_before_it():
    native = pytest.importorskip("detr_fast._C", reason="needs the native module")
    from detr_fast.ops import assignment

    cost = torch.rand(64, 400, 300)

    def most(results: list[torch.Tensor]) -> int:
        native.start_counting_memory()
        results.clear()
        results.append(assignment(cost, [300] * 64))
        return native.stop_counting_memory()

    results: list[torch.Tensor] = []
    alone, after_another = most(results), most(results)
    assert alone - after_another == pytest.approx(8 * results[0].numel(), rel=0.01)
    again = assignment(cost, [300] * 64)
    native.start_counting_memory()
    assert native.stop_counting_memory() == 0 and torch.equal(results[0], again), (
        "what is between two counts is in neither"
    )


def test_peak_memory_of_contestants_that_say_more_of_it(monkeypatch):
    monkeypatch.setattr(harness, "REST", 0.0)

    def keeps():
        kept = []
        return lambda: kept or kept.append(torch.rand(2**18)) or kept

    contestants = [Contestant("keeps", keeps()), Contestant("fresh", keeps(), fresh=keeps)]
    contestants.append(Contestant("theirs", keeps(), counts_memory=False))
    timings = compare(Contest(contestants, lambda _: None), seconds_each=0.0, min_rounds=2)
    assert [timing.peak_bytes for timing in timings] == [0, 2**20, None]


def test_shapes_name_themselves_once_and_know_their_tokens():
    assert len({shape.name for shape in MATCHING_SHAPES}) == len(MATCHING_SHAPES)
    assert MATCHING_SHAPES[0].num_tokens == 25 * 42
    assert any(0 in shape.targets for shape in MATCHING_SHAPES), "no image without targets"


def test_original_matching_agrees_with_ours_and_a_wrong_one_is_refused():
    from benchmarks import bench_matching

    contest = bench_matching.contest(SMALL)
    compare(contest, seconds_each=0.0, min_rounds=1)

    def swapped():
        matches = contest.contestants[1].run()
        queries, chosen = matches[1][2]
        matches[1][2] = (queries, chosen.flip(0))
        return matches

    def incomplete():
        return [[(queries[1:], chosen[1:]) for queries, chosen in images] for images in contest.contestants[1].run()]

    for cheat, message in (
        (swapped, "total cost"),
        (incomplete, "layer 0, image 0: counts="),
        (list, "matches of 0 layers"),
    ):
        with pytest.raises(WrongResult, match=f"cheat is wrong, so no speed is given: {message}"):
            compare(Contest([*contest.contestants, Contestant("cheat", cheat)], contest.check))


def test_a_peer_that_cannot_run_is_left_out_with_its_reason(monkeypatch):
    theirs = pytest.importorskip("transformers.loss.loss_for_object_detection")
    from benchmarks import bench_matching

    def broken(*arguments):
        raise NameError("no corners here")

    monkeypatch.setattr(theirs.HungarianMatcher, "forward", broken)
    contest = bench_matching.contest(SMALL)
    assert contest.skipped["transformers"] == "its matcher does not run here: NameError: no corners here"
    assert "transformers" not in [contestant.name for contestant in contest.contestants]


def test_original_giou_is_that_of_the_package():
    from detr_fast.ops import boxes

    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    corner, size = torch.rand(2, 9, 2, generator=generator, dtype=torch.float64)
    boxes_xyxy = torch.cat([corner, corner + size], -1)
    expected = boxes.pairwise_giou(boxes_xyxy[:4], boxes_xyxy[4:])
    torch.testing.assert_close(original.giou_of_all_pairs(boxes_xyxy[:4], boxes_xyxy[4:]), expected)


def run_pytest(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say how busy it is")
def test_what_others_use_of_the_machine_is_counted_without_our_own(monkeypatch):
    monkeypatch.setattr(machine, "STARTED", time.monotonic() - 10)
    monkeypatch.setattr(machine, "OWN_BEFORE", machine.own_seconds() - 4)
    monkeypatch.setattr(machine, "busy_seconds", lambda: machine.BUSY_BEFORE + 9)
    assert machine.cores_of_others() == pytest.approx(0.5, abs=0.05)
    monkeypatch.undo()
    assert machine.busy_seconds() > machine.own_seconds()


def test_benchmarks_are_skipped_with_a_reason_unless_asked_for():
    run = run_pytest("benchmarks/", "-rs")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "a benchmark: runs with --benchmark" in run.stdout
    assert "passed" not in run.stdout.splitlines()[-1]


def test_the_benchmark_option_runs_them_and_writes_both_files(tmp_path):
    results, theirs = tmp_path / "folder" / "results.json", tmp_path / "theirs.json"
    run = run_pytest(
        *("benchmarks/", "--benchmark", "-k", "test_matching and coco-2 and not cost", "--benchmark-max-time=0.01"),
        *(f"--benchmark-results={results}", f"--benchmark-json={theirs}"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "commit: " in run.stdout
    assert "[1 of 7] matching coco-2" in run.stdout, "the progress line counts what -k picks"
    written = json.loads(results.read_text())
    assert {"cpu", "versions", "commit", "command"} <= set(written)
    assert written["cores_of_others"] is None or written["cores_of_others"] >= 0
    assert 0 < written["elapsed_seconds"] < 300 and written["finished"]
    assert "1 contests took 0 minutes and " in run.stdout
    assert "-k 'test_matching and coco-2 and not cost'" in written["command"], "it can be typed as it stands"
    ours = {
        (contest, entry["contestant"]): entry for contest, entries in written["contests"].items() for entry in entries
    }
    expected = {("matching coco-2", name) for name in ("original", "detr_fast", "match_layers", "reference")}
    assert expected <= set(ours)
    saved = json.loads(theirs.read_text())
    assert saved["detr_fast"]["command"] == written["command"]
    assert "command" not in saved["machine_info"]["detr_fast"], "pytest-benchmark warns where it differs between runs"
    for entry in saved["benchmarks"]:
        same = ours[entry["group"], entry["params"]["contestant"]]
        assert entry["stats"]["median"] == pytest.approx(same["median_seconds"], rel=1e-6)
        assert entry["extra_info"]["ratio"] == same["ratio_to_first"]
