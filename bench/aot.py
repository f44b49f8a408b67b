"""Compile every Triton kernel for GPUs that are not here, and record what each needs: registers, spills, instructions.

    python -m bench.aot                                 # everything, on the screen
    python -m bench.aot --arch 90 --only select         # variants whose name contains "select", for sm_90
    python -m bench.aot --stale --write                 # what bench/results/aot.json lacks; update it and aot.md

A process per variant: a compiler that aborts takes only its own variant down, and Triton decides once per process (by
TRITON_INTERPRET, which these processes do not see) whether kernels are compiled at all. A spill is a register that
ptxas had to keep in memory; LDL and STL are the loads and stores this costs.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import datetime
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.aot_cases import Variant, attention_variants, diverse_variants, selection_variants
from bench.aot_merging import merging_variants

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)


def variants() -> dict[str, Variant]:
    """Every variant by its name."""
    found = [*attention_variants(), *selection_variants(), *diverse_variants(), *merging_variants()]
    by_name = {variant.name: variant for variant in found}
    if len(by_name) != len(found):
        repeated = [name for name, n in collections.Counter(variant.name for variant in found).items() if n > 1]
        raise ValueError(f"variants: expected distinct names, got {repeated} more than once")
    return by_name


def _sources(function) -> dict[str, str]:
    """Code of a kernel, of the functions it calls, and the constants they use: no comments, no docstrings."""
    import triton

    sources = {}

    def visit(function) -> None:
        tree = function.parse()
        body = tree.body[0].body
        if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]
        sources[function.__name__] = ast.unparse(tree)
        for node in ast.walk(tree):
            value = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(value, triton.JITFunction) and value.__name__ not in sources:
                visit(value)
            elif isinstance(value, (triton.language.constexpr, int, float, str, tuple)):
                sources[node.id] = repr(value)

    visit(function)
    return sources


def digest(variant: Variant) -> str:
    """Of all that decides the machine code but the compiler: a table entry with another digest is out of date."""
    parts = (_sources(variant.function), variant.signature, variant.constexprs)
    text = repr([*(sorted(part.items()) for part in parts), variant.num_warps, variant.num_stages])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- one variant


def compile_variant(variant: Variant, architecture: int) -> dict[str, int]:
    """Compile for sm_<architecture> and count: needs no GPU. Raises what Triton raises where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}

    def add(path: tuple[int, ...], kind: str) -> str:
        kind, _, divisor = kind.partition(":")
        if kind.startswith("*") or divisor == "16":
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for position, name in enumerate(variant.function.arg_names):
        if name in variant.constexprs:
            signature[name], constants[(position,)] = "constexpr", variant.constexprs[name]
        elif isinstance(variant.signature[name], tuple):
            signature[name] = tuple(add((position, k), kind) for k, kind in enumerate(variant.signature[name]))
        else:
            signature[name] = add((position,), variant.signature[name])
    compiled = triton.compile(
        ASTSource(fn=variant.function, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    return {"shared": compiled.metadata.shared, **_machine_code(compiled.asm["cubin"])}


_COUNTED = {  # column of the table: opcodes in the machine code
    "HGMMA": r"HGMMA\b",  # tensor cores of sm_90
    "HMMA": r"HMMA\b",  # of all before it, and of sm_120
    "UTCMMA": r"UTC\w*MMA\b",  # of sm_100
    "EX2": r"MUFU\.EX2",
    "SHFL": r"SHFL\b",
    "REDUX": r"C?REDUX\b",
    "BAR": r"BAR\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
}


def _machine_code(cubin: bytes) -> dict[str, int]:
    import triton

    tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")

    def dump(option: str) -> str:
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = dump("-res-usage"), dump("-sass")
    if torn := torn_addresses(code):
        raise RuntimeError(f"miscompiled: both halves of an address come from one register: {torn[0]}")
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", code, re.MULTILINE)
    figures = {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1])}
    figures |= {name: sum(bool(re.match(p, opcode)) for opcode in opcodes) for name, p in _COUNTED.items()}
    return {**figures, "instructions": len(opcodes)}


def _compile_here(name: str, architectures: list[int]) -> None:
    """What a child process does: a line of JSON per architecture."""
    variant = variants()[name]
    for architecture in architectures:
        began = time.perf_counter()
        try:
            figures = compile_variant(variant, architecture)
        except Exception as error:  # any of the compiler's many: the table says which
            figures = {"error": " ".join(str(error.__cause__ or error).split())[-300:]}
        line = {"digest": digest(variant), "warps": variant.num_warps, "stages": variant.num_stages, **figures}
        print(json.dumps([architecture, line, time.perf_counter() - began]), flush=True)


_LOW = re.compile(r"UIADD3 (UR\d+), (UP\d), (UR\d+), .*?;")
_WRITTEN = re.compile(r"\b([A-Z][\w.]*) UR(\d+),")
_HIGH = re.compile(r"UIADD3\.X UR\d+, (UR\d+), .*?, (UP\d), !UPT ;")


def torn_addresses(code: str) -> list[str]:
    """64-bit additions whose low half is read from the register of the high half, in text that cuobjdump prints.

    ptxas 12.8 made such code of the address of a tile that tensor cores read: everything after the first step of the
    product was computed from other memory. It was seen on a GPU only, by wrong results.
    """
    found, low = [], {}  # predicate with the carry -> the instruction that sets it, and the register it reads
    for line in code.splitlines():
        if (match := _HIGH.search(line)) is not None and match[2] in low:
            instruction, register = low.pop(match[2])
            if register == match[1]:
                found.append(f"{instruction} {match[0]}")
        if (match := _WRITTEN.search(line)) is not None:  # what is read from the register behind this is something else
            written = {f"UR{int(match[2]) + i}" for i in range(2 if ".64" in match[1] else 1)}
            low = {carry: entry for carry, entry in low.items() if entry[1] not in written}
        if (match := _LOW.search(line)) is not None and match[1] != match[3]:
            low[match[2]] = match[0], match[3]
    return found


# ----------------------------------------------------------------------------------------------------------- command


def compile_apart(name: str, architectures: list[int]) -> dict[int, tuple[dict, float]]:
    """Compile a variant in a process of its own: figures, or what went wrong as "error", and seconds."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", "--compile", name, "--arch", *map(str, architectures)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    results = {}
    for line in done.stdout.splitlines():
        architecture, figures, seconds = json.loads(line)
        results[architecture] = figures, seconds
    for architecture in architectures:
        if architecture not in results:
            last = done.stderr.strip().splitlines()[-1:] or [""]
            results[architecture] = {"error": f"exit status {done.returncode}: {last[0]}"}, 0.0
    return results


def _summary(figures: dict) -> str:
    if "error" in figures:
        return f"FAILED  {figures['error'][:80]}"
    spills = figures["LDL"] + figures["STL"]
    mma = figures["HGMMA"] + figures["HMMA"] + figures["UTCMMA"]
    return (
        f"{figures['registers']:3d} registers  {spills:4d} spills  {figures['shared'] / 1024:5.1f} KiB shared"
        f"  {mma:3d} MMA  {figures['instructions']:5d} instructions"
    )


def table_path() -> Path:
    return RESULTS / "aot.json"


def read_table() -> dict:
    """{"triton": version, "date": day, "kernels": {variant: {architecture: figures}}}; no kernels without a file."""
    path = table_path()
    return json.loads(path.read_text()) if path.exists() else {"kernels": {}}


def stale(architectures: Sequence[int] = ARCHITECTURES) -> list[str]:
    """Variants that the table lacks for one of these architectures, or has of other code or another Triton."""
    import triton

    table = read_table()
    current = table["kernels"] if table.get("triton") == triton.__version__ else {}
    return [
        name
        for name, variant in variants().items()
        if {current.get(name, {}).get(str(arch), {}).get("digest") for arch in architectures} != {digest(variant)}
    ]


def write_table(new: dict[str, dict[int, dict]]) -> None:
    """Merge figures into the table. Entries that another Triton made, or of variants that are no more, are dropped."""
    import triton

    old, known = read_table(), variants()
    if old.get("triton") != triton.__version__:
        old = {"kernels": {}}
    kernels = {}
    for name in known:
        merged = old["kernels"].get(name, {}) | {str(arch): figures for arch, figures in new.get(name, {}).items()}
        if merged:
            kernels[name] = {str(arch): merged[str(arch)] for arch in ARCHITECTURES if str(arch) in merged}
    table = {"triton": triton.__version__, "date": datetime.date.today().isoformat(), "kernels": kernels}
    RESULTS.mkdir(exist_ok=True)
    rows = ",\n".join(
        f"    {json.dumps(name)}: {{\n"
        + ",\n".join(f"      {json.dumps(arch)}: {json.dumps(figures)}" for arch, figures in entries.items())
        + "\n    }"
        for name, entries in kernels.items()
    )
    head = json.dumps({"triton": table["triton"], "date": table["date"]})[1:-1]
    table_path().write_text(f'{{\n  {head},\n  "kernels": {{\n{rows}\n  }}\n}}\n')
    (RESULTS / "aot.md").write_text(_markdown(table))


def _markdown(table: dict) -> str:
    columns = ("warps", "stages", "registers", "stack", "LDL", "STL", "shared", *list(_COUNTED)[:-2], "instructions")
    lines = [
        "# What the kernels need on each GPU",
        "",
        f"Generated by `python -m bench.aot --write` with Triton {table['triton']} on {table['date']}, without a GPU.",
        "Registers are per thread; stack and shared memory in bytes; LDL and STL count the instructions of spilled",
        "registers, and the last columns count instructions in the program, not in its execution.",
    ]
    for architecture in map(str, ARCHITECTURES):
        lines += ["", f"## sm_{architecture}", "", "| kernel | " + " | ".join(columns) + " |"]
        lines.append("|---|" + "---:|" * len(columns))
        for name, entries in table["kernels"].items():
            figures = entries.get(architecture)
            if figures is not None:
                lines.append(f"| {name} | " + " | ".join(str(figures[column]) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--stale", action="store_true", help="variants that the table lacks or has out of date")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--write", action="store_true", help="update bench/results/aot.json and aot.md")
    parser.add_argument("--compile", metavar="NAME", help="compile one variant in this process, print JSON")
    options = parser.parse_args()
    if options.compile:
        _compile_here(options.compile, options.arch)
        return 0

    names = [name for name in variants() if options.only in name]
    if not names:
        parser.error(f"--only: no variant's name contains {options.only!r}")
    if options.stale:
        behind = stale(options.arch)
        names = [name for name in names if name in behind]
    results, failed = {}, 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(compile_apart, name, options.arch): name for name in names}
        for done, future in enumerate(concurrent.futures.as_completed(running), 1):
            name = running[future]
            results[name] = {}
            for architecture, (figures, seconds) in sorted(future.result().items()):
                if "error" in figures:  # not for the table, which goes on lacking this one
                    failed += 1
                else:
                    results[name][architecture] = figures
                place = f"{done:3d}/{len(names)}"
                print(f"{place}  {name:44s} sm_{architecture:<4d}{_summary(figures)}  {seconds:5.1f} s", flush=True)
    if options.write:
        write_table(results)
        print(f"wrote {table_path().relative_to(ROOT)} and aot.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
