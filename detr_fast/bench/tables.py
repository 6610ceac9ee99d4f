"""The README's tables of results, written between markers that say what stands in them.

A marker is an HTML comment with JSON; what is below it, up to ``<!-- /results -->``, is generated: the table, and the
command that measured it:

    <!-- results {"file": "machine-matching", "head": "batch", "rows": {"matching coco-2": "2 images"},
    "columns": {"original": "original", "ours": "match_layers", "times faster": "match_layers: ratio"}} -->

``rows`` gives contests their labels; ``columns`` says, by title, which contestant's median a column shows, or
with ": ratio" or ": memory" behind it how many times faster it is or its peak memory. "best other" is the quickest
contestant that is not ours; "best other / native" is how many times quicker than that native is.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from detr_fast.bench.results import Results, Row, format_bytes, format_ratio, format_seconds

BLOCK = re.compile(r"<!-- results (?P<spec>\{.*?\}) -->\n(?P<table>.*?)<!-- /results -->", re.DOTALL)
OURS = ("detr_fast", "match_layers", "native", "reference", "total", "triton", "auction", "compiled", "optimized")
NOT_MEASURED = "not measured"


def is_ours(name: str) -> bool:
    """Whether a contestant is this package's: one of OURS, or "detr_fast" in another setting, such as a precision."""
    return name in OURS or name.startswith("detr_fast")


def fill_tables(text: str, results: Sequence[Results]) -> str:
    """The text with every table between markers written anew.

    Raises:
        ValueError: a marker is no JSON, or names a file, contest or contestant that is not there.
    """
    by_name = {of.name: of for of in results}

    def fill(block: re.Match[str]) -> str:
        try:
            spec = json.loads(block["spec"])
            lines = _table(spec, by_name)
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"a marker of a table must name what there is: {error} in {block['spec']}") from error
        if spec["file"] in by_name:
            lines += ["", f"`{typed(by_name[spec['file']].head['command'])}`"]
        return f"<!-- results {block['spec']} -->\n" + "\n".join(lines) + "\n<!-- /results -->"

    return BLOCK.sub(fill, text)


def typed(command: str) -> str:
    """What decides a measurement, without what decides where it is written and how much is shown of it."""
    words = iter(shlex.split(command))
    kept = []
    for word in words:
        if word == "--benchmark-results":
            next(words, None)
        elif word not in ("-q", "--no-header") and not word.startswith("--benchmark-results="):
            kept.append(word)
    return shlex.join(kept)


def _table(spec: dict[str, Any], results: dict[str, Results]) -> list[str]:
    contests = results[spec["file"]].contests if spec["file"] in results else None
    head = [spec["head"], *spec["columns"]]
    lines = [head, ["---"] * len(head)]
    for contest, label in spec["rows"].items():
        rows = None if contests is None else {row.name: row for row in contests[contest]}
        lines.append([label, *(_cell(column, rows) for column in spec["columns"].values())])
    return ["|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |" for line in lines]


def _cell(column: str, rows: dict[str, Row] | None) -> str:
    if rows is None:
        return NOT_MEASURED
    if " / " in column:
        slow, quick = column.split(" / ")
        return format_ratio(_find(slow, rows).median / _find(quick, rows).median)
    name, _, kind = column.partition(": ")
    row = _find(name, rows)
    if kind == "ratio":
        return format_ratio(row.ratio)
    return format_bytes(row.peak_bytes) if kind == "memory" else format_seconds(row.median)


def _find(name: str, rows: dict[str, Row]) -> Row:
    if name == "best other":
        return min((r for r in rows.values() if not r.is_floor and not is_ours(r.name)), key=lambda row: row.median)
    return rows[name]
