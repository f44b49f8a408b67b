"""The table of compiled kernels (bench/results/aot.json) is complete, current, and says what the compiler says."""

import concurrent.futures
import importlib
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

# Compiled anew for sm_90: a kernel of each kind, where speed counts most.
SAMPLE = (
    "strip_kernel/clip_b32/bf16/output",
    "attention_kernel/clip_l/bf16/output",
    "attention_kernel/qwen/bf16/scores",
    "scores_kernel/vjepa2/bf16/output",
    "select_kernel/clip_l",
)
REGENERATE = "out of date: run `python -m bench.aot --stale --write`"


@pytest.fixture(scope="module")
def aot():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent)
        yield importlib.import_module("bench.aot")


@pytest.fixture(scope="module")
def table(aot):
    table = aot.read_table()
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table was made with Triton {table['triton']}, here is {triton.__version__}")
    return table


def test_every_variant_is_recorded_for_every_gpu(aot, table):
    assert aot.stale() == [], REGENERATE
    assert list(table["kernels"]) == list(aot.variants()), REGENERATE


def test_the_page_shows_the_table(aot, table):
    page = (aot.RESULTS / "aot.md").read_text()
    assert page == aot._markdown(table), REGENERATE
    assert page.count("\n| select_kernel/clip_l |") == len(aot.ARCHITECTURES)


@pytest.fixture(scope="module")
def compiled(aot):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda name: aot.compile_apart(name, [90]), SAMPLE)
        return {name: result[90][0] for name, result in zip(SAMPLE, results)}


def test_hot_kernels_compile(compiled):
    """With whatever Triton is installed: CI runs this under the oldest one that is supported, too."""
    for name, figures in compiled.items():
        assert "error" not in figures, (name, figures)
        assert figures["LDL"] == figures["STL"] == figures["stack"] == 0, (name, figures)
        assert (figures["HGMMA"] > 0) == (not name.startswith("select_kernel")), (name, figures)


def test_compiling_again_gives_the_recorded_figures(table, compiled):
    for name, figures in compiled.items():
        recorded = table["kernels"][name]["90"]
        assert figures["registers"] <= recorded["registers"], (name, REGENERATE)
        assert figures["shared"] <= recorded["shared"], (name, REGENERATE)


def test_half_precision_on_sm_90_spills_nothing_and_uses_its_tensor_cores(table):
    hot = [name for name in table["kernels"] if "/bf16/" in name or "/fp16/" in name]
    assert len(hot) > 20
    for name in hot:
        figures = table["kernels"][name]["90"]
        assert figures["LDL"] == figures["STL"] == figures["stack"] == 0, (name, figures)
        assert (figures["HGMMA"] > 0) == (not name.startswith("reduce_kernel")), (name, figures)


def test_spills_are_seen(table):
    """Sixteen tokens per thread of 64 registers: the one kernel that is known to spill."""
    figures = table["kernels"]["select_kernel/16384_packed"]["90"]
    assert figures["registers"] == 64
    assert figures["LDL"] > 0
    assert figures["STL"] > 0


def test_digest_follows_the_code(aot):
    variant = aot.variants()["select_kernel/clip_l"]
    assert aot.digest(variant) == aot.digest(variant._replace(name="another"))
    constants = {**variant.constexprs, "ROWS": 16}
    others = [variant._replace(num_warps=8), variant._replace(constexprs=constants)]
    assert len({aot.digest(v) for v in (variant, *others)}) == 3
    text = aot._sources(variant.function)
    assert {"select_kernel", "_best", "_keys", "_load_scores", "_near", "_ANCHOR"} <= set(text)
    assert "Eq. 5" not in text["_near"]  # a docstring


def test_a_compiler_that_fails_is_reported(aot):
    figures, _ = aot.compile_apart("no such kernel", [90])[90]
    assert "exit status 1" in figures["error"]
    assert "no such kernel" in figures["error"]
    assert "FAILED" in aot._summary(figures)


TORN = """
        /*4e20*/                   UIADD3 UR4, UP0, UR7, 0x20, URZ ;
        /*4e30*/                   UIADD3.X UR5, UR7, -0x3ffffff0, URZ, UP0, !UPT ;
"""
WHOLE = """
        /*12d0*/                   UIADD3 UR10, UP0, UR10, 0x2, URZ ;
        /*12e0*/                   UIADD3 UR7, UR7, 0x2, URZ ;
        /*12f0*/                   UIADD3 UR8, UP1, UR6, 0x2, URZ ;
        /*1320*/                   UIADD3.X UR7, UR6, -0x7fffffe0, URZ, UP0, !UPT ;
        /*1330*/                   UIADD3.X UR9, UR5, -0x7fffffe0, URZ, UP1, !UPT ;
"""
REUSED = """
        /*0b90*/                   UIADD3 UR7, UP0, UR4, 0x2, URZ ;
        /*0bb0*/                   UMOV UR4, URZ ;
        /*0bd0*/                   UIADD3.X UR6, UR4, 0x40000040, URZ, UP0, !UPT ;
        /*0be0*/                   UIADD3 UR7, UP0, UR5, 0x2, URZ ;
        /*0bf0*/                   UIADD3.64 UR4, UR14, 0x2, URZ ;
        /*0c00*/                   UIADD3.X UR6, UR5, 0x40000040, URZ, UP0, !UPT ;
        /*0c10*/                   UIADD3 UR4, UP0, UR4, 0x20, URZ ;
        /*0c20*/                   UIADD3.X UR5, UR4, 0x40000040, URZ, UP0, !UPT ;
"""


def test_a_miscompiled_address_is_found(aot):
    assert len(aot.torn_addresses(TORN)) == 1
    assert "UR4, UP0, UR7" in aot.torn_addresses(WHOLE + TORN)[0]
    assert aot.torn_addresses(WHOLE) == []
    assert aot.torn_addresses(REUSED) == []  # the registers hold something else by then
