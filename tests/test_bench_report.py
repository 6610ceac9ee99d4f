"""The page and the tables that are made of results files, and two files side by side."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from detr_fast.bench import compare, figures, growth, page, tables
from detr_fast.bench.findings import read_findings
from detr_fast.bench.results import format_seconds, read_all

REPOSITORY = Path(__file__).parent.parent
KEPT = REPOSITORY / "benchmarks" / "results"


def entry(name: str, seconds: float, ratio: float, **more: object) -> dict[str, object]:
    found = {"contestant": name, "median_seconds": seconds, "ratio_to_first": ratio, "peak_bytes": 3 * 2**20}
    rounds = [0.98 * seconds, seconds, 1.02 * seconds, seconds, seconds]
    return found | {"quartiles_seconds": [0.9 * seconds, 1.1 * seconds], "seconds": rounds} | more


def write(folder: Path, name: str, contests: dict[str, list], gpu: str = "none", **more: object) -> Path:
    head = {"cpu": "a <slow> cpu", "memory": "1 GiB", "gpu": gpu, "system": "Linux", "versions": "torch 2"}
    content = head | {"commit": "abc", "command": f"pytest {name}", "contests": contests} | more
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content))
    return file


@pytest.fixture()
def files(tmp_path: Path) -> list[Path]:
    """One file of a CPU with a curve that grows as the square, one of a GPU with parts."""
    square = {
        f"matching over queries: {n}": [entry("original", 1e-6 * n**2, 1.0), entry("native", 1e-7 * n, 10.0 * n)]
        for n in (10, 100, 1000)
    }
    matching = [entry("original", 0.01, 1.0), entry("native", 0.001, 10.0, floor_share=0.5)]
    matching += [entry("floor: logits read", 0.0005, 20.0)]
    step = [entry(n, s, r, kernels=700, host_waits=0) for n, s, r in (("original", 2.0, 1.0), ("detr_fast", 1.0, 2.0))]
    parts = {"train step": {"backbone": step, "matcher": [entry("original", 1.0, 1.0), entry("detr_fast", 1.0, 1.0)]}}
    parts["train step"]["(data, beside it)"] = [entry("original", 0.03, 1.0), entry("detr_fast", 0.008, 1.0)]
    skipped = {"matching coco-2": {"lapx": "not installed"}}
    cpu = write(
        tmp_path, "cpu", square | {"matching coco-2": matching}, skipped=skipped, refused={"loss": "x is wrong"}
    )
    return [cpu, write(tmp_path, "gpu", {"train step": step}, gpu="H100", parts=parts)]


class Checker(HTMLParser):
    """Collects tags that are not closed, and everything that would be loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe"):
            self.loaded.append(tag)
        self.loaded += [v for k, v in attributes if k.endswith(("src", "href")) and v and not v.startswith("#")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_says_where_numbers_come_from(files):
    text = page.render(read_all(files))
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and checker.loaded == []
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    for expected in ("a &lt;slow&gt; cpu", "pytest cpu", "pytest gpu", "torch 2", "commit abc", "x is wrong"):
        assert expected in text
    assert "lapx: not installed" in text
    assert text.count("<svg") == 4, "a curve, a contest, the parts of a step, and the step"
    assert "exponent 2.00 ± 0.00" in text and "exponent 1.00 ± 0.00" in text
    assert "<td>2.00 s (67 %)</td><td>1.00 s (50 %)</td>" in text
    assert "<td>30.0 ms (1.0 %)</td><td>8.00 ms (0.40 %)</td>" in text, "shares are of the parts without brackets"
    assert "waits for the device: original 0 times, detr_fast 0 times" in text


def test_checks_without_a_clock_are_on_the_page(tmp_path, files):
    kinds = {kind: {"problems": 12345, "excess": 0.123456} for kind in ("uniform", "<integers>")}
    runs = [{"command": f"check --seed {seed}", "seconds": 3, "kinds": kinds} for seed in (1, 2)]
    (tmp_path / "exactness.json").write_text(json.dumps(runs))
    sharpness = {"command": "sharpen", "trained": {"plain": {"AP": 0.5}, "sharp": {"AP": 0.6}}, "true": {"PQ": 0.9}}
    (tmp_path / "sharpness.json").write_text(json.dumps(sharpness))
    findings = read_findings(tmp_path.glob("*.json"))
    assert [of.name for of in findings] == ["exactness", "sharpness"], "results files are not among them"
    (run,) = findings[1].runs
    assert run.command == "sharpen" and run.facts == {}
    assert run.tables() == [{"trained: plain": {"AP": 0.5}, "trained: sharp": {"AP": 0.6}}, {"true": {"PQ": 0.9}}]
    text = page.render(read_all(files), findings)
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and checker.loaded == []
    for expected in ("check --seed 2", "seconds: 3", "<td>kinds: &lt;integers&gt;</td><td>12,345</td><td>0.1235</td>"):
        assert expected in text
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ValueError, match="half.json must be JSON"):
        read_findings([tmp_path / "half.json"])


def test_the_page_says_how_long_all_of_it_took(tmp_path):
    contests = {"loss": [entry("original", 1.0, 1.0), entry("total", 0.1, 10.0)]}
    files = [write(tmp_path, name, contests, elapsed_seconds=s) for name, s in (("a", 110), ("b", 190))]
    files.append(write(tmp_path, "gpu", contests, gpu="H100", elapsed_seconds=7))
    text = page.render(read_all(files))
    assert "<td>110 s</td>" in text and "<td>3.2 minutes</td>" in text
    assert "<p>a &lt;slow&gt; cpu: 5.0 minutes together<br>a &lt;slow&gt; cpu and H100: 7 s together</p>" in text
    files.append(write(tmp_path, "old", contests))
    files.append(write(tmp_path, "half", contests, elapsed_seconds=1, finished=False))
    text = page.render(read_all(files))
    assert (
        "not in it, because it was not recorded: old<" in text
        and '<td>1 s <span class="refused">cut short</span></td>' in text
    )


def test_another_setting_of_ours_is_ours(tmp_path):
    rows = [entry(name, s, 0.4 / s) for name, s in (("detr_fast", 0.4), ("openvino", 0.3), ("detr_fast-int8", 0.2))]
    alone, theirs = [entry("original", 1.0, 1.0), entry("detr_fast", 0.4, 2.5)], [entry("original", 1.0, 1.0)]
    contests = {"inference in int8": rows, "inference": alone, "inference of theirs": theirs}
    text = page.render(read_all([write(tmp_path, "cpu", contests)]))
    assert "inference in int8: detr_fast-int8 200 ms, 2.0 times as fast as detr_fast<" in text
    assert '<tr class="ours"><td>detr_fast-int8</td>' in text and '<tr class=""><td>openvino</td>' in text
    assert "inference in int8, to detr_fast<" in text and "inference, to original<" in text


def test_a_disturbed_contest_leaves_the_plot_its_scale(tmp_path):
    wild = entry("total", 0.1, 10.0) | {"seconds": [1e-9, 0.1, 0.1, 0.1, 1e9]}
    contests = {"loss": [entry("original", 1.0, 1.0), wild]}
    (results,) = read_all([write(tmp_path, "cpu", contests)])
    assert results.contests["loss"][1].ratio_spread[1] > 1e9
    assert re.search(r">20<", figures.ratios(results.contests)) is None, "the axis ends at 15"


def test_a_quick_run_is_only_mentioned(tmp_path):
    contests = {"loss": [entry("original", 1.0, 1.0), entry("total", 0.1, 10.0)]}
    full = write(tmp_path, "full", contests, elapsed_seconds=600)
    quick = write(tmp_path, "quick", contests, elapsed_seconds=180, command="pytest benchmarks/ --benchmark-quick")
    text = page.render(read_all([full, quick]))
    assert "<td>quick: a quick run, not shown below</td>" in text and "<td>3.0 minutes</td>" in text
    assert "10.0 minutes together" in text and text.count("<h2 id=") == 1


def test_the_kept_checks_are_read():
    found = {of.name: of for of in read_findings(KEPT.glob("*.json"))}
    assert {"exactness", "mask_sharpness"} <= set(found)
    assert all(run.rows for of in found.values() for run in of.runs)


def test_what_no_gpu_ran_is_shown_as_not_measured(files):
    text = page.render(read_all(files))
    assert '<td>matching coco-2</td><td><span class="absent">not measured</span></td>' in text
    assert '<td>train step</td><td><span class="absent">not measured' not in text


def test_the_exponent_and_its_range():
    exact = growth.fit([(n, 3e-6 * n**1.5) for n in (10, 20, 50, 200)])
    assert exact.exponent == pytest.approx(1.5) and exact.error == pytest.approx(0, abs=1e-6)
    assert (exact.smallest, exact.largest) == (10, 200)
    # Of four logarithms 0 to 3 with residuals 1, -1, -1, 1 times h: slope error t(0.975, 2) * h * sqrt(4 / 2 / 5).
    h = 0.1
    points = [
        (1, math.exp(h)),
        (round(math.e), math.exp(math.log(3) - h)),
        (9, 9 * math.exp(-h)),
        (27, 27 * math.exp(h)),
    ]
    spread = 5 * math.log(3) ** 2
    assert growth.fit(points).error == pytest.approx(4.302652729696 * h * math.sqrt(2 / spread))
    assert growth.fit([(1, 1.0), (2, 2.0)]).error is None
    with pytest.raises(ValueError, match="two sizes at least"):
        growth.fit([(1, 1.0), (1, 2.0)])


def test_the_readmes_tables_are_what_the_results_files_give():
    text = (REPOSITORY / "README.md").read_text()
    assert len(tables.BLOCK.findall(text)) >= 4
    assert tables.fill_tables(text, read_all(KEPT.glob("*.json"))) == text, (
        "run: detr-fast bench-report --readme README.md"
    )


def marker(**spec: object) -> str:
    return f"before\n<!-- results {json.dumps(spec)} -->\nold\n<!-- /results -->\nafter\n"


def test_tables_are_written_between_markers(files):
    rows, columns = (
        {"matching coco-2": "2 images"},
        {"time": "native", "times": "native: ratio", "MiB": "native: memory"},
    )
    columns |= {"best": "best other", "quicker": "best other / native"}
    filled = tables.fill_tables(marker(file="cpu", head="batch", rows=rows, columns=columns), read_all(files))
    assert filled.splitlines()[2:-2] == [
        "| batch | time | times | MiB | best | quicker |",
        "|---|---|---|---|---|---|",
        "| 2 images | 1.00 ms | 10 | 3.00 MiB | 10.0 ms | 10 |",
        "",
        "`pytest cpu`",
    ]
    assert filled.startswith("before\n") and filled.endswith("<!-- /results -->\nafter\n")
    absent = tables.fill_tables(marker(file="h100", head="", rows={"a": "b"}, columns={"c": "d"}), read_all(files))
    assert "| b | not measured |" in absent
    with pytest.raises(ValueError, match="must name what there is: 'matching'"):
        tables.fill_tables(marker(file="cpu", head="", rows={"matching": ""}, columns={"c": "native"}), read_all(files))


def test_a_command_is_shown_without_where_it_wrote():
    command = "pytest benchmarks/a.py -k 'b or c' --benchmark -q --no-header --benchmark-results x/y.json"
    assert tables.typed(command) == "pytest benchmarks/a.py -k 'b or c' --benchmark"
    assert tables.typed("pytest a.py --benchmark-results=x.json -x") == "pytest a.py -x"


def test_two_runs_side_by_side(tmp_path):
    def contest(ratio: float) -> dict[str, list]:
        return {"loss": [entry("original", 1.0, 1.0), entry("total", 1 / ratio, ratio)]}

    before, same, moved = (write(tmp_path, n, contest(r)) for n, r in (("a", 10.0), ("b", 10.7), ("c", 20.0)))
    found = compare.changes(*read_all([before, same]))
    assert [change.beyond_spread for change in found] == [False]
    assert "same within the spread\n0 of 1 ratios differ" in compare.render(found)
    assert "differs\n1 of 1" in compare.render(compare.changes(*read_all([before, moved])))
    (tmp_path / "again").mkdir()
    namesake = write(tmp_path / "again", "a", contest(20.0))
    (change,) = compare.changes(*compare.read_two([namesake, before]))
    assert (change.before.ratio, change.after.ratio) == (20.0, 10.0), "in the order in which they were named"
    with pytest.raises(ValueError, match=r"must be given two results files, got \['[^']*a.json'\]"):
        compare.read_two([before])
    other = write(tmp_path, "d", contest(10.0), gpu="H100")
    with pytest.raises(ValueError, match="two files of one machine, got 'none' and 'H100'"):
        compare.changes(*read_all([before, other]))


def test_bad_files_are_named(tmp_path):
    (tmp_path / "half.json").write_text('{"contests": {"a": [{"contestant": "b"}]}}')
    with pytest.raises(ValueError, match="half.json must be a results file"):
        read_all([tmp_path / "half.json"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="results must name files written by"):
        read_all([tmp_path / "list.json"])


def test_the_command(tmp_path, files):
    from typer.testing import CliRunner

    from detr_fast.cli import app

    output, readme = tmp_path / "page.html", tmp_path / "README.md"
    readme.write_text(marker(file="cpu", head="", rows={"matching coco-2": "x"}, columns={"time": "native"}))
    run = CliRunner().invoke(app, ["bench-report", *map(str, files), "--output", str(output), "--readme", str(readme)])
    assert run.exit_code == 0, run.output
    assert output.read_text().startswith("<!DOCTYPE html>")
    assert "| x | 1.00 ms |" in readme.read_text()
    run = CliRunner().invoke(app, ["bench-report", "--compare", str(files[0]), str(files[0])])
    assert run.exit_code == 0 and "0 of 4 ratios differ" in run.output
    assert "kept" not in run.output
    contests = {"loss": [entry("original", 1.0, 1.0), entry("total", 0.1, 10.0)]}
    quiet = write(tmp_path, "quiet", contests, cores_of_others=0.05)
    noisy = write(tmp_path, "noisy", contests, cores_of_others=1.52)
    run = CliRunner().invoke(app, ["bench-report", "--compare", str(quiet), str(noisy)])
    assert run.output.endswith("noisy: other processes kept 1.5 cores busy meanwhile\n") and "quiet:" not in run.output
    assert page.render(read_all([quiet, noisy])).count("cores busy meanwhile") == 1
    run = CliRunner().invoke(app, ["bench-report", "--compare"])
    assert isinstance(run.exception, ValueError) and "compare must be given two" in str(run.exception)
    run = CliRunner().invoke(app, ["bench-report", str(files[0]), str(files[0])])
    assert isinstance(run.exception, ValueError) and "different names" in str(run.exception)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234, "1.23 s"), (0.9999, "1.00 s"), (0.0123, "12.3 ms"), (9.39e-7, "939 ns"), (3e-6, "3.00 us")],
)
def test_durations_have_three_digits(seconds, text):
    assert format_seconds(seconds) == text
