"""results.md: the goals first, then each section's table; and the lines that a run prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Results = dict[str, Any]
Row = dict[str, Any]

_UNSEEN = ("us quartiles", "graph us quartiles", "calls per sample", "samples", "no graph")  # in results.json only


# -------------------------------------------------------------------------------------------------------------- goals


class Goal(NamedTuple):
    text: str
    realistic: float
    moonshot: float
    value: float | None  # None: not measured

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        smaller_is_better = self.moonshot < self.realistic

        def reaches(goal: float) -> bool:
            return self.value <= goal if smaller_is_better else self.value >= goal

        return "moonshot" if reaches(self.moonshot) else "realistic" if reaches(self.realistic) else "missed"


def _rows(results: Results, section: str, case: str, computes: str | None = None) -> dict[str, Row]:
    cases = results["sections"].get(section, {}).get("cases", [])
    rows = next((found.get("rows", []) for found in cases if found["case"] == case), [])
    return {row["way"]: row for row in rows if row.get("computes") == computes and "us" in row}


def _prefill(results: Results, case: str) -> Row:
    cases = results["sections"].get("llava", {}).get("cases", [])
    return next((row for found in cases if found["case"] == case for row in found.get("rows", [])), {})


def _best(row: Row | None) -> float | None:
    return None if row is None else min(row["us"], row.get("graph us", row["us"]))


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


def _fastest(rows: dict[str, Row], begins: str) -> float | None:
    return min((_best(row) for way, row in rows.items() if way.startswith(begins)), default=None)


def goals(results: Results) -> list[Goal]:
    """What the kernels were designed to reach, and what this run measured."""
    found = []
    fused = "output + scores"
    for case, realistic, moonshot in (
        ("CLIP-L B=1", 1.75, 1.25),
        ("CLIP-L B=8", 1.75, 1.25),
        ("CLIP-L B=64", 1.75, 1.25),
        ("V-JEPA2 B=8", 1.75, 1.25),
        ("SigLIP B=32", 1.65, 1.35),
        ("Qwen 4096", 1.65, 1.35),
    ):
        rows = _rows(results, "attention", case, fused)
        value = _ratio(_best(rows.get("ours")), _fastest(rows, "sdpa"))
        found.append(Goal(f"{case}: output + scores / fastest SDPA", realistic, moonshot, value))
    for case in ("CLIP-L B=8", "V-JEPA2 B=8"):
        rows = _rows(results, "attention", case, "scores only")
        value = _ratio(_best(rows.get("flash-colreduce")), _best(rows.get("ours")))
        found.append(Goal(f"{case}: flash-colreduce / scores only", 2.0, 3.0, value))
    rows = _rows(results, "paths", "CLIP-L B=8")
    ours = _fastest({way: row for way, row in rows.items() if "scores_kernel" in way}, "")
    value = _ratio(_best(rows.get("FlagAttention, scores pass")), ours)
    found.append(Goal("CLIP-L B=8: FlagAttention's scores pass / ours", 1.5, 2.5, value))
    rows = _rows(results, "selection", "CLIP-L 576 to 192, B=1")
    ours, chain, fixed = (rows.get(way, {}) for way in ("ours", "released chain", "fixed-size chain"))
    value = _ratio(chain.get("us"), ours.get("us"))
    found.append(Goal("selection: the eager torch chain / ours, launched", 10.0, 20.0, value))
    value = _ratio(fixed.get("graph us"), ours.get("graph us"))
    found.append(Goal("selection: the torch chain without waits / ours, in CUDA graphs", 4.0, 7.0, value))
    for batch in (1, 8, 64):
        rows = _rows(results, "encoder", f"CLIP-L/14-336 B={batch}")
        pruned, stock, released = (rows.get(way) for way in ("scored and pruned", "sdpa", "released code"))
        value = _ratio(_best(pruned), _best(stock))
        found.append(Goal(f"encoder B={batch}: scored and pruned / SDPA", 1.0, 0.96, value))
        value = _ratio((pruned or {}).get("us"), (stock or {}).get("us"))
        found.append(Goal(f"encoder B={batch}: scored and pruned / SDPA, launched", 1.0, 0.96, value))
        value = _ratio((released or {}).get("us"), (pruned or {}).get("us"))
        found.append(Goal(f"encoder B={batch}: released code / scored and pruned, launched", 2.0, 4.0, value))
    for name, tokens, goal, moonshot in (
        ("LLaVA-NeXT-7B B=1", 320, 7.5, 8.5),
        ("LLaVA-1.5-7B B=1", 64, 2.0, 3.0),
        ("LLaVA-1.5-7B B=8", 64, 2.0, 3.0),
    ):
        whole, part = (_prefill(results, f"{name}, {kind}") for kind in ("unpruned", f"{tokens} tokens"))
        for column, seen in (("prefill ms", "prefill"), ("prefill GPU ms", "prefill, GPU time alone")):
            text = f"{name}: {seen}, unpruned / {tokens} tokens"
            found.append(Goal(text, goal, moonshot, _ratio(whole.get(column), part.get(column))))
    memory = _rows(results, "attention", "Qwen 16384", fused).get("ours", {}).get("extra MiB")
    copies = _ratio(memory, 16 * 16384 * 80 * 2 / 2**20)
    found.append(Goal("Qwen 16384: extra memory, in copies of the queries", 4.0, 3.0, copies))
    return found


# ------------------------------------------------------------------------------------------------------------ failures


def _is_ours(section: str, row: Row) -> bool:
    """Whether a row's failure is a defect here: blocks that do not fit a GPU are none, wrong results are."""
    if section in ("paths", "tune"):
        return row["failure"].startswith("wrong")
    return row["way"] == "ours"


def failures(results: Results) -> list[str]:
    """What should not have happened: broken sections and cases, and ways of ours that are wrong or raise."""
    found = []
    for name, section in results["sections"].items():
        if section["status"] == "failed":
            found.append(f"{name}: {section['reason']}")
        for case in section["cases"]:
            if case["status"] == "failed":
                found.append(f"{name}, {case['case']}: {case['reason']}")
            broken = (row for row in case.get("rows", []) if "failure" in row and _is_ours(name, row))
            found += [f"{name}, {case['case']}, {row.get('computes', row['way'])}: {row['failure']}" for row in broken]
    return found


# ------------------------------------------------------------------------------------------------------------- writing


def case_line(case: Results) -> str:
    """A case in one line."""
    if case["status"] != "done":
        return f"{case['status']}: {case['reason']}"
    parts = []
    for row in case["rows"]:
        ratio = row.get("x ours, graph", row.get("x ours"))
        if row["way"] == "ours" and "us" in row:
            parts.append(f"ours {_number(_best(row))} us")
        elif row["way"] == "ours":
            parts.append(f"ours FAILED, {row['failure']}")
        elif ratio is not None:
            parts.append(f"{row['way']} {_number(ratio)}x")
        elif "prefill ms" in row:
            parts.append(f"{row['way']} prefill {_number(row['prefill ms'])} ms, decode {_number(row['decode ms'])} ms")
    return f"{case['seconds']:.1f} s; " + ", ".join(parts or [f"{len(case['rows'])} rows"])


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")


def _table(rows: list[Row]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in _UNSEEN))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "".join("---|" if key in ("case", "way", "computes") else "---:|" for key in columns)
    for row in rows:
        yield "| " + " | ".join(_number(row[key]) if row.get(key) is not None else "" for key in columns) + " |"


def _by_reason(rows: list[Row], cases: list[Results]) -> dict[str, list[str]]:
    """What is not in the table, and why, with the cases that it is true of."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        if "failure" in row:
            found.setdefault(f"{row['way']}: {row['failure']}", {})[row["case"]] = None
        if "no graph" in row:
            found.setdefault(f"{row['way']}, no graph: {row['no graph']}", {})[row["case"]] = None
    for case in cases:
        if case["status"] != "done":
            found.setdefault(f"{case['status']}: {case['reason']}", {})[case["case"]] = None
    return {text: list(names) for text, names in found.items()}


def markdown(results: Results) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    rates = machine.get("rates", {})
    lines = ["# GPU suite", ""]
    if results["quick"]:
        lines += ["**A dry run: every shape is tiny, and no figure here means anything.**", ""]
    lines += [f"`{results['command']}`, {results['date']}, commit {results['commit']}", ""]
    lines += [f"- {device}" for device in machine.get("devices", [])]
    lines += [f"- {versions}, CUDA {machine.get('cuda', 'none')}; {machine.get('platform', '')}"] if versions else []
    if rates:
        lines.append(
            f"- Rates behind the floors: {rates['flops'] / 1e12:.0f} TFLOP/s of bfloat16 matrix product and "
            f"{rates['bytes'] / 1e12:.2f} TB/s of copying, measured in this run; {rates['exps'] / 1e12:.2f} T exp2/s"
        )
    lines += ["", "## Failures", ""]
    lines += [f"- {failure}" for failure in failures(results)] or ["None."]
    lines += ["", "## Goals", "", "| | measured | realistic | moonshot | reached |", "|---|---:|---:|---:|---|"]
    for goal in goals(results):
        value = "" if goal.value is None else f"{goal.value:.2f}"
        lines.append(f"| {goal.text} | {value} | {goal.realistic:g} | {goal.moonshot:g} | {goal.verdict} |")
    lines += [
        "",
        "us: the median of samples launched call by call; graph us: of replays of a CUDA graph, where a call is short.",
        "x ours: that way's time over ours (above 1: ours is faster). Errors: the largest difference from float64 over",
        "the largest value. Of floor: the floor's time over ours.",
    ]
    for name, section in results["sections"].items():
        lines += ["", f"## {name}: {section['status']}", ""]
        if "reason" in section:
            lines += [section["reason"], ""]
        lines += [f"- {test}" for test in section.get("failed tests", [])]
        rows = [{"case": case["case"], **row} for case in section["cases"] for row in case.get("rows", [])]
        shown = [row for row in rows if "failure" not in row]
        lines += _table(shown) if shown else []
        lines += [""]
        lines += [f"- {text}: {', '.join(cases)}" for text, cases in _by_reason(rows, section["cases"]).items()]
    return "\n".join(lines)
