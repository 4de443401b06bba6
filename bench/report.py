"""The figures as text, as Markdown in bench/README.md, and as a picture for the README."""

import json
import os
import platform
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

from bench.lab import Figure
from bench.servers import versions

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PICTURE = HERE / "results.svg"
README = HERE / "README.md"
BEGIN, END = "<!-- figures: written by make bench -->", "<!-- end of figures -->"
PEERS = {"ours": "Tablecast", "node": "Node.js", "python": "python-socketio"}
PARTS = (
    "fanout",
    "load",
    "writers",
    "latency",
    "bulk",
    "replay",
    "filters",
    "connect",
    "start",
    "memory",
    "crowd",
    "rest",
    "page",
)
LOAD_BEFORE = os.getloadavg()[0]  # how busy the machine is with other things
VERDICTS = {True: "reached", False: "**missed**", None: ""}


def remember(part: str, figures: list[Figure], seconds: float) -> None:
    """Keep a part's figures, along with those that earlier runs left."""
    results = recall()
    results[part] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "seconds": round(seconds, 1),
        "figures": [figure.as_json() for figure in figures],
    }
    ordered = {part: results[part] for part in PARTS if part in results}
    RESULTS.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def recall() -> dict[str, Any]:
    """Return what has been measured so far, by part."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results


def write() -> None:
    """Write the figures section of bench/README.md, and the picture."""
    results = recall()
    if not results:
        return
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{as_markdown(results)}\n{END}{after}")
    PICTURE.write_text(as_svg(results))


def summary(parts: list[str]) -> str:
    """Say how many of these parts' targets are reached, and list those that are not."""
    results = recall()
    aims = [f for part in parts if part in results for f in results[part]["figures"] if f["target"]]
    missed = [figure["what"] for figure in aims if figure["reached"] is False]
    reached = sum(figure["reached"] is True for figure in aims)
    return "\n  ".join([f"\n{reached} of {len(aims)} targets reached", *missed]) if aims else ""


def as_text(figures: list[Figure]) -> str:
    """Return a table to read in a terminal."""
    rows = [["", *PEERS.values(), "ratio", "target", "", "limit"]]
    rows += [_cells(figure.as_json()) for figure in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:5], widths[1:5], strict=True)]
        cells += [cell.ljust(width) for cell, width in zip(row[5:], widths[5:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += list(dict.fromkeys(f"  ({figure.note})" for figure in figures if figure.note))
    return "\n".join(lines).replace("**", "")


def as_markdown(results: dict[str, Any]) -> str:
    """Return the section with all figures, and where and when they were measured."""
    lines = []
    for where in dict.fromkeys((r["date"], r["machine"], r["versions"]) for r in results.values()):
        parts = [part for part in results if _where(results[part]) == where]
        measured = "" if len(parts) == len(results) else f" ({', '.join(parts)})"
        lines.append(f"Measured on {where[0]}{measured}: {where[1]}; {where[2]}.\n")
    lines.append("| | " + " | ".join(PEERS.values()) + " | ratio to Node.js | target | | limit |")
    lines.append("|---|--:|--:|--:|--:|---|---|---|")
    notes: list[str] = []
    for part, result in results.items():
        lines.append(f"| **{part}** | | | | | | | |")
        for figure in result["figures"]:
            cells = _cells(figure)
            if figure["note"]:
                if figure["note"] not in notes:
                    notes.append(figure["note"])
                cells[0] += f" ({notes.index(figure['note']) + 1})"
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def as_svg(results: dict[str, Any]) -> str:
    """Return bars for each figure that has a target, scaled to its largest value."""
    figures = [
        figure
        for result in results.values()
        for figure in result["figures"]
        if figure["target"] and len(figure["values"]) > 1
    ]
    bar, gap, top, left, width = 13, 14, 58, 330, 300
    body, y = [], top
    for figure in figures:
        values = figure["values"]
        largest = max([*values.values(), figure["limit"] or 0])
        what, _, detail = figure["what"].partition(", ")
        better = "more is better" if figure["unit"] == "/s" else "less is better"
        detail = f"{detail}, {better}" if detail else better
        middle = y + bar * len(values) / 2
        body.append(f'<text x="{left - 12}" y="{middle}" class="what">{escape(what)}</text>')
        body.append(
            f'<text x="{left - 12}" y="{middle + 13}" class="small">{escape(detail)}</text>'
        )
        height = bar * len(values)
        if figure["limit"]:
            x = left + width * figure["limit"] / largest
            body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3}" y2="{y + height + 1}"/>')
        for name, value in values.items():
            length = max(1.0, width * value / largest)
            body.append(
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 2}" class="{name}"/>'
                f'<text x="{left + length + 6:.1f}" y="{y + bar - 4}" class="value">'
                f"{escape(_number(value, figure['unit']))}</text>"
            )
            y += bar
        y += gap
    legend = "".join(
        f'<rect x="{left + 120 * index}" y="30" width="11" height="11" class="{name}"/>'
        f'<text x="{left + 120 * index + 16}" y="40">{label}</text>'
        for index, (name, label) in enumerate(PEERS.items())
    )
    day = max(result["date"] for result in results.values())
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {y + 16}" role="img">
<title>Tablecast compared with Node.js and python-socketio, {day}</title>
<style>
  text {{ font: 12px system-ui, sans-serif; fill: #1f2933 }}
  .what {{ text-anchor: end }}
  .small {{ text-anchor: end; font-size: 10px; fill: #7b8794 }}
  .value {{ font-variant-numeric: tabular-nums; font-size: 11px }}
  .ours {{ fill: #0b7285 }} .node {{ fill: #f0a429 }} .python {{ fill: #b0b8c1 }}
  line {{ stroke: #d64545; stroke-width: 1.5 }}
  @media (prefers-color-scheme: dark) {{
    text {{ fill: #e4e7eb }} .ours {{ fill: #22b8cf }} .python {{ fill: #6b7683 }}
  }}
</style>
<text x="{left}" y="18">Measured side by side in one run, {day}. Red: the physical limit.</text>
{legend}
{chr(10).join(body)}
</svg>
"""


def machine() -> str:
    """Return processor, cores, kernel, and the load when this run began."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    kernel = platform.release().partition("-")[0]
    return f"{model}, {os.cpu_count()} cores, Linux {kernel}, load {LOAD_BEFORE:.1f} before the run"


def _cells(figure: dict[str, Any]) -> list[str]:
    unit = figure["unit"]
    values = [figure["values"].get(name) for name in PEERS]
    limit = figure["limit"]
    return [
        figure["what"],
        *("–" if value is None else _number(value, unit) for value in values),
        "" if figure["ratio"] is None else f"{figure['ratio']:.2f}",
        figure["target"],
        VERDICTS[figure["reached"]],
        "" if limit is None else f"{_number(limit, unit)} {figure['limit_is']}",
    ]


def _number(value: float, unit: str) -> str:
    if value >= 1e6:
        number = f"{value / 1e6:.1f} million"
    elif value >= 100:
        number = f"{value:,.0f}"
    elif value >= 10:
        number = f"{value:.1f}"
    else:
        number = f"{value:.2f}"
    return f"{number} {unit}".replace(" /s", "/s").strip()


def _where(result: dict[str, Any]) -> tuple[str, str, str]:
    return result["date"], result["machine"], result["versions"]
