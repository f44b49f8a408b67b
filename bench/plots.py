"""Pictures and a page of what `make bench` or bench/sweeps.py measured.

python -m bench.plots out/bench.json --out DIR

Reads pytest-benchmark's JSON; writes DIR/README.md and a PNG for each file of benchmarks and each sweep.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from hiprune_kernels.environment import environment


def read(path: Path) -> dict[str, Any]:
    """The report.

    Raises:
        ValueError: if the file is none of pytest-benchmark, or has no ratios in it.
    """
    try:
        found = json.loads(path.read_text())
        benchmarks = [each for each in found["benchmarks"] if "median_ms" in each["extra_info"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a report of pytest-benchmark ({error})") from error
    if not benchmarks:
        raise ValueError(f"{path}: expected benchmarks with ratios, got none")
    return {**found, "benchmarks": benchmarks}


def sweep_figure(name: str, rows: list[dict[str, Any]]) -> Any:
    """Time over what is swept, a line for each implementation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["extra_info"]["sweep"]["at"]):
        for implementation, milliseconds in row["extra_info"]["median_ms"].items():
            lines[implementation].append((row["extra_info"]["sweep"]["at"], milliseconds))
    for implementation, points in lines.items():
        alone = implementation.endswith("alone")
        style = {"color": "gray", "linestyle": ":"} if alone else {"marker": "o"}
        if implementation == "ours":
            style |= {"color": "black", "linewidth": 2.5}
        axes.plot(*zip(*points), label=implementation, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlabel(rows[0]["extra_info"]["sweep"]["of"])
    axes.set_ylabel("milliseconds, median")
    axes.set_title(name, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def ratio_figure(name: str, rows: list[dict[str, Any]]) -> Any:
    """Of each benchmark the alternatives' times as multiples of ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["extra_info"]["times_ours"]))
    for i, kind in enumerate(kinds):
        points = [(row["extra_info"]["times_ours"].get(kind), place) for place, row in enumerate(rows)]
        points = [(x, y) for x, y in points if x is not None]
        axes.scatter(*zip(*points), label=kind, marker="osD^vP*X"[i % 8], s=26)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["name"].removeprefix("test_") for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time as a multiple of ours (right of the line: ours is faster)")
    axes.set_title(name, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def write(report: dict[str, Any], out: Path) -> list[Path]:
    """All pictures and the page; their paths."""
    sweeps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in report["benchmarks"]:
        if "sweep" in row["extra_info"]:
            sweeps[row["extra_info"]["sweep"]["figure"]].append(row)
        else:
            files[Path(row["fullname"].split("::")[0]).name].append(row)
    figures = [(name, sweep_figure(name, rows), rows) for name, rows in sweeps.items()]
    figures += [(name, ratio_figure(name, rows), rows) for name, rows in files.items()]
    out.mkdir(parents=True, exist_ok=True)
    cpu = report.get("machine_info", {}).get("cpu", {}).get("brand_raw", "a processor that did not say its name")
    commit = (report.get("commit_info") or {}).get("id") or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in environment()["versions"].items())
    lines = ["# Benchmarks", "", f"{cpu}; {report.get('datetime', '')}; commit {commit[:12]}; {versions}.", ""]
    paths = []
    for i, (name, figure, rows) in enumerate(figures):
        paths.append(out / f"{i + 1:02}.png")
        figure.savefig(paths[-1], dpi=90)
        kinds = list(dict.fromkeys(kind for row in rows for kind in row["extra_info"]["median_ms"]))
        lines += [f"## {name}", "", f"![{name}]({paths[-1].name})", "", f"| milliseconds | {' | '.join(kinds)} |"]
        lines.append("|---" + "|---:" * len(kinds) + "|")
        for row in rows:
            found = row["extra_info"]["median_ms"]
            cells = [f"{found[kind]:.4g}" if kind in found else "" for kind in kinds]
            lines.append(f"| {row['name'].removeprefix('test_')} | {' | '.join(cells)} |")
        lines.append("")
    (out / "README.md").write_text("\n".join(lines))
    return [*paths, out / "README.md"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        paths = write(read(args.report), args.out)
    except ValueError as error:
        parser.exit(2, f"bench.plots: {error}\n")
    print(f"wrote {len(paths)} files, {paths[-1]}")


if __name__ == "__main__":
    main()
