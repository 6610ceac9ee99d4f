"""The results as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from detr_fast.bench import figures
from detr_fast.bench.findings import Facts, Findings, Run
from detr_fast.bench.growth import POINT, curves, fit
from detr_fast.bench.results import Contests, Results, Row, format_bytes, format_ratio, format_seconds
from detr_fast.bench.tables import NOT_MEASURED, is_ours

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; margin: 2rem auto; max-width: 1060px;
  padding: 0 1rem; }
h1 { font-size: 1.9rem; } h2 { margin-top: 3rem; border-bottom: 2px solid #e5e7eb; } h3 { margin: 1.6rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; margin: .4rem 0 1rem; }
th, td { padding: .18rem .7rem; text-align: right; border-bottom: 1px solid #e5e7eb; }
th:first-child, td:first-child, .text td, .text th { text-align: left; } th { color: #6b7280; font-weight: 600; }
tr.ours td { background: #eff6ff; font-weight: 600; } tr.floor td, .absent { color: #9ca3af; }
code { font-size: 12.5px; background: #f3f4f6; padding: .1rem .3rem; border-radius: 3px; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } .wide svg { min-width: 700px; }
details { margin: .3rem 0; } summary { cursor: pointer; color: #374151; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); gap: 1rem; }
.refused { color: #b91c1c; } .scroll { overflow-x: auto; }
"""


def render(results: Sequence[Results], findings: Sequence[Findings] = ()) -> str:
    """The whole page."""
    full = [of for of in results if not of.is_quick]
    sections = [_overview(results, findings), *map(_section, full), *map(_findings, findings)]
    body = "\n".join([*sections, _not_measured(results)])
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>detr_fast: measured</title><style>{STYLE}</style></head>\n<body><h1>detr_fast: measured</h1>\n"
        "<p>Medians of contestants that take turns in one process, each checked against the right answer before any "
        "is timed, and their quartiles. A ratio is formed turn by turn, to the first contestant of its table; <em>in a "
        "rerun</em> and the plots' bars say where another run has it, 19 times of 20 on a steady machine. "
        "Ours are discs in the plots and blue in the tables. Peak memory is what torch's allocator and "
        "the native module hold at once in a call.</p>\n"
        f"{body}\n</body></html>\n"
    )


def _overview(results: Sequence[Results], findings: Sequence[Findings]) -> str:
    rows = [
        [_quick(of) if of.is_quick else _link(of.name), *map(_text, (of.head["cpu"], _gpu(of)))]
        + [str(len(of.contests)), _elapsed(of)]
        for of in results
    ]
    table = _table(["file", "processor", "GPU", "contests", "took"], rows, kind="text") + _together(results)
    others = ", ".join(_link(of.name) for of in findings)
    return f"<h2>Files</h2>{table}" + (f"<p>Checks without a clock: {others}.</p>" if others else "")


def _link(name: str) -> str:
    return f'<a href="#{_id(name)}">{_text(name)}</a>'


def _quick(results: Results) -> str:
    return f"{_text(results.name)}: a quick run, not shown below"


def _elapsed(results: Results) -> str:
    if results.elapsed_seconds is None:
        return '<span class="absent">not recorded</span>'
    cut_short = "" if results.finished else ' <span class="refused">cut short</span>'
    return f"{_duration(results.elapsed_seconds)}{cut_short}"


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def _together(results: Sequence[Results]) -> str:
    """How long the files of each machine took, but for quick runs, which measure what the others do."""
    missing = [of.name for of in results if of.elapsed_seconds is None]
    totals: dict[str, int] = {}
    for of in results:
        if not of.is_quick and of.elapsed_seconds is not None:
            cpu = of.head["cpu"].rsplit(", ", 1)[0]  # without the number of threads
            machine = cpu + (f" and {of.head['gpu']}" if of.has_gpu else "")
            totals[machine] = totals.get(machine, 0) + of.elapsed_seconds
    lines = [f"{_text(machine)}: {_duration(seconds)} together" for machine, seconds in totals.items()]
    if missing:
        lines.append(f"not in it, because it was not recorded: {_text(', '.join(missing))}")
    return f"<p>{'<br>'.join(lines)}</p>" if totals else ""


def _gpu(results: Results) -> str:
    return results.head["gpu"] if results.has_gpu else "none"


def _section(results: Results) -> str:
    """One file: where its numbers come from, then its plots and tables."""
    pieces = [f'<h2 id="{_id(results.name)}">{_text(results.name)}</h2>', _origin(results)]
    pieces += [f'<p class="refused">{_text(name)}: refused. {_text(why)}</p>' for name, why in results.refused.items()]
    pieces += _growth(results.contests)
    for name, parts in results.parts.items():
        pieces += [f"<h3>{_text(name)}: where the time goes</h3>", _wide(figures.anatomy(parts)), _parts_table(parts)]
        pieces.append(_host_waits(results.contests.get(name, [])))
    for family, contests in _families(results.contests).items():
        pieces.append(f"<h3>{_text(family)}</h3>")
        pieces.append(_wide(figures.ratios(contests)))
        pieces += [_contest(name, rows, results.skipped.get(name, {})) for name, rows in contests.items()]
    return "\n".join(pieces)


def _origin(results: Results) -> str:
    head = results.head
    machine = f"{head['cpu']}; {head['memory']} of memory; GPU: {head['gpu']}; {head['system']}"
    lines = [_text(machine), _text(head["versions"]), f"commit {_text(head['commit'])}"]
    lines += [f'<span class="refused">{results.disturbance}</span>'] if results.disturbance else []
    return f"<p>{'<br>'.join(lines)}<br><code>{_text(head['command'])}</code></p>"


def _growth(contests: Contests) -> list[str]:
    """Plots of the curves, and their exponents."""
    pieces = []
    for curve in curves(contests):
        rows = []
        for name, points in curve.lines.items():
            if len({size for size, _ in points}) > 1:
                found = fit(points)
                rows.append([_text(name), str(found), f"{found.smallest} to {found.largest}"])
        head = ["", "exponent, 95 % range", f"{curve.axis} from, to"]
        exponents = f"<details><summary>exponents of growth</summary>{_table(head, rows)}</details>"
        pieces.append(f"<div>{figures.growth(curve)}{exponents}</div>")
    return ['<div class="curves">', *pieces, "</div>"] if pieces else []


def _parts_table(parts: Contests) -> str:
    """Seconds and share of each part, by contestant."""
    names = [row.name for row in next(iter(parts.values()))]
    totals = {name: sum(_of(rows, name) for rows in figures.shares(parts).values()) for name in names}
    body = [
        [_text(part), *(f"{format_seconds(_of(rows, n))} ({_percent(_of(rows, n) / totals[n])})" for n in names)]
        for part, rows in parts.items()
    ]
    return _table(["part", *map(_text, names)], body)


def _percent(share: float) -> str:
    """Two digits."""
    digits = 0 if share >= 0.0995 else 1 if share >= 0.00995 else 2
    return f"{100 * share:.{digits}f} %"


def _host_waits(rows: Sequence[Row]) -> str:
    """A sentence on how often the host waits in a call."""
    counted = [f"{_text(row.name)} {row.host_waits} times" for row in rows if row.host_waits is not None]
    if not counted:
        return "<p>On a CPU there is no device that the host could wait for.</p>"
    return f"<p>In a call the host waits for the device: {', '.join(counted)}.</p>"


def _of(rows: Sequence[Row], name: str) -> float:
    return next((row.median for row in rows if row.name == name), 0.0)


def _families(contests: Contests) -> dict[str, Contests]:
    """Contests by what they measure, which is the beginning of their names; points of curves are drawn elsewhere."""
    found: dict[str, Contests] = {}
    for name, rows in contests.items():
        if POINT.fullmatch(name) is None:
            first, *rest = name.split()
            family = f"{first} {rest[0]}" if rest[:1] in (["inference"], ["training"]) else first
            found.setdefault(family, {})[name] = rows
    return found


def _contest(name: str, rows: Sequence[Row], skipped: dict[str, str]) -> str:
    """One table, folded away: the plot above shows its ratios."""
    on_gpu = any(row.kernels is not None for row in rows)
    with_floor = any(row.floor_share is not None for row in rows)
    head = ["", "median", "quartiles", "ratio", "in a rerun", "peak memory"]
    head += ["floor's share"] * with_floor + ["kernels", "waits"] * on_gpu
    body = [_cells(row, with_floor, on_gpu) for row in rows]
    classes = ["floor" if row.is_floor else "ours" if is_ours(row.name) else "" for row in rows]
    absent = "; ".join(f"{_text(who)}: {_text(why)}" for who, why in skipped.items())
    note = f'<p class="absent">Did not take part: {absent}</p>' if absent else ""
    best = max((row for row in rows[1:] if is_ours(row.name)), key=lambda row: row.ratio, default=rows[0])
    speed = f"{format_seconds(best.median)}, {format_ratio(best.ratio)} times as fast as {_text(rows[0].name)}"
    summary = f"{_text(name)}: {_text(best.name)} {speed}"
    return f"<details><summary>{summary}</summary>{_table(head, body, classes=classes)}{note}</details>"


def _cells(row: Row, with_floor: bool, on_gpu: bool) -> list[str]:
    cells = [_text(row.name), format_seconds(row.median), " to ".join(map(format_seconds, row.quartiles))]
    cells += [
        format_ratio(row.ratio),
        " to ".join(map(format_ratio, row.ratio_spread)),
        format_bytes(row.peak_bytes),
    ]
    if with_floor:
        cells.append("" if row.floor_share is None else f"{100 * row.floor_share:.0f} %")
    return [*cells, str(row.kernels), str(row.host_waits)] if on_gpu else cells


def _findings(findings: Findings) -> str:
    """One file of a check: a block for each of its runs."""
    runs = [f"<details{' open' * (number == 0)}>{_run(run)}</details>" for number, run in enumerate(findings.runs)]
    return "\n".join([f'<h2 id="{_id(findings.name)}">{_text(findings.name)}</h2>', *runs])


def _run(run: Run) -> str:
    facts = "<br>".join(f"{_text(name)}: {_text(_value(value))}" for name, value in run.facts.items())
    tables = "".join(_facts_table(table) for table in run.tables())
    return f"<summary><code>{_text(run.command)}</code></summary><p>{facts}</p>{tables}"


def _facts_table(rows: dict[str, Facts]) -> str:
    columns = list(next(iter(rows.values())))
    body = [[_text(name), *(_text(_value(value)) for value in facts.values())] for name, facts in rows.items()]
    return _table(["", *(_text(column.replace("_", " ")) for column in columns)], body)


def _value(value: object) -> str:
    """Four digits of a number with a fraction, groups of three of a whole one."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _not_measured(results: Sequence[Results]) -> str:
    """What no file has a number for on a GPU, though there is one on a CPU."""
    on_cpu = dict.fromkeys(name for of in results if not of.has_gpu for name in of.contests)
    on_gpu = {name for of in results if of.has_gpu for name in of.contests}
    rows = [[_text(name), f'<span class="absent">{NOT_MEASURED}</span>'] for name in on_cpu if name not in on_gpu]
    if not rows:
        return ""
    text = "<p><code>scripts/gpu_check.sh</code> measures these on a machine with a GPU.</p>"
    listed = _table(["contest", "on a GPU"], rows, kind="text")
    return f"<h2>Not measured</h2>{text}<details><summary>{len(rows)} contests on a GPU</summary>{listed}</details>"


def _table(head: Iterable[str], rows: Sequence[Sequence[str]], kind: str = "", classes: Sequence[str] = ()) -> str:
    of_rows = classes or [""] * len(rows)
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = [
        f'<tr class="{of}">' + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for of, row in zip(of_rows, rows, strict=True)
    ]
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>\n' + "\n".join(lines) + "</table></div>"


def _wide(figure: str) -> str:
    """Scrolls in a narrow window."""
    return f'<div class="scroll wide">{figure}</div>'


def _text(text: str) -> str:
    return html.escape(text)


def _id(name: str) -> str:
    return html.escape(name.replace(" ", "-"))
