"""bench/gpu_suite without a GPU: its clockwork on a scripted clock, its measures on a CPU at tiny sizes."""

import importlib
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import hiprune_kernels as hk
from hiprune_kernels import reference

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
MODULES = "attention conductor context encoder floors gpu_tests llava models report selection timing ways worker"


@pytest.fixture(scope="module")
def suite():
    """The modules of bench.gpu_suite, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        names = [*MODULES.split(), "__main__"]
        yield SimpleNamespace(**{name: importlib.import_module(f"bench.gpu_suite.{name}") for name in names})


@pytest.fixture
def context(suite):
    return suite.context.Context(CPU, suite.timing.HostClock(), quick=True)


class ScriptedClock:
    """Time passes only where a call says so: `self.now` is in seconds."""

    def __init__(self, timing):
        self.now, self.prepared, self.captured = 0.0, 0, []
        self._error = timing.NotCapturableError
        self.capturable = True

    def call(self, seconds, log=None, entry=None):
        def run():
            self.now += seconds
            if log is not None:
                log.append(entry)

        return run

    def elapsed(self, run):
        before = self.now
        run()
        return self.now - before

    def elapsed_after(self, prepare, calls):
        total = 0.0
        for call in calls:
            prepare()
            self.prepared += 1
            total += self.elapsed(call)
        return total

    def capture(self, calls):
        if not self.capturable:
            raise self._error("it waits")
        self.captured.append(len(calls))

        def replay():
            self.now += 1e-6 * len(calls)

        return replay


# -------------------------------------------------------------------------------------------------------------- timing


def test_samples_last_as_long_as_asked(suite):
    clock = ScriptedClock(suite.timing)
    (times,) = suite.timing.compare({"a": [clock.call(3e-5)]}, clock, samples=20, graph_below=0.0).values()
    assert times.launched.calls == 34  # the fewest that last a millisecond
    assert times.launched.samples == 20
    assert times.launched.median == pytest.approx(3e-5)
    assert times.graph is None and times.note == ""


def test_inputs_take_turns_through_all_samples(suite):
    clock, log = ScriptedClock(suite.timing), []
    calls = [clock.call(4e-4, log, i) for i in range(4)]
    suite.timing.compare({"a": calls}, clock, samples=2, graph_below=0.0)
    assert log == [i % 4 for i in range(len(log))]


def test_ways_are_interleaved_and_another_is_first_each_round(suite):
    clock, log = ScriptedClock(suite.timing), []
    ways = {name: [clock.call(1.0, log, name)] for name in "abc"}
    suite.timing.compare(ways, clock, samples=4, warm_up=0)
    assert "".join(log[-12:]) == "abcbcacababc"


def test_the_median_and_quartiles_of_the_samples(suite):
    assert suite.timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0], 7) == suite.timing.Timing(3.0, 1.5, 4.5, 5, 7)
    assert suite.timing.Timing.of([2.0], 1) == suite.timing.Timing(2.0, 2.0, 2.0, 1, 1)


def test_a_graph_is_timed_per_call(suite):
    clock = ScriptedClock(suite.timing)
    (times,) = suite.timing.compare({"a": [clock.call(5e-5)] * 3}, clock, samples=5).values()
    assert clock.captured == [18]  # whole turns over the three inputs, at most a millisecond of launched calls
    assert times.graph.median == pytest.approx(1e-6)
    assert times.graph.calls == 18 * 56  # replays until a millisecond is full
    assert times.best == pytest.approx(1e-6)


def test_long_calls_get_no_graph_and_a_refused_one_says_why(suite):
    clock = ScriptedClock(suite.timing)
    (times,) = suite.timing.compare({"a": [clock.call(2e-3)]}, clock, samples=2).values()
    assert clock.captured == [] and times.graph is None and times.note == ""
    clock.capturable = False
    (times,) = suite.timing.compare({"a": [clock.call(1e-4)]}, clock, samples=2).values()
    assert times.graph is None and times.note == "it waits"
    assert times.best == times.launched.median == pytest.approx(1e-4)


def test_preparation_is_not_timed(suite):
    clock = ScriptedClock(suite.timing)

    def prepare():
        clock.now += 7.0

    (times,) = suite.timing.compare({"a": [clock.call(1e-3)]}, clock, samples=2, prepare=prepare).values()
    assert times.launched.median == pytest.approx(1e-3) and clock.prepared > 2 and clock.captured == []


def test_a_way_that_raises_is_left_out(suite):
    clock, told = ScriptedClock(suite.timing), {}

    def broken():
        raise ValueError("no")

    ways = {"broken": [broken], "fine": [clock.call(1.0)]}
    assert list(suite.timing.compare(ways, clock, samples=1, on_failure=told.__setitem__)) == ["fine"]
    assert str(told["broken"]) == "no"
    with pytest.raises(ValueError, match="no"):
        suite.timing.compare(ways, clock, samples=1)
    assert suite.timing.compare({}, clock, samples=1) == {}


def test_the_host_clock_reads_real_time(suite):
    clock = suite.timing.HostClock()
    assert 0.02 <= clock.elapsed(lambda: time.sleep(0.02)) < 0.5
    assert 0.02 <= clock.elapsed_after(lambda: time.sleep(0.1), [lambda: time.sleep(0.02)]) < 0.1
    with pytest.raises(suite.timing.NotCapturableError, match="CPU"):
        clock.capture([])


class FakeCuda:
    """What CudaClock uses of torch.cuda, with a device that works through its queue only when it is waited for."""

    def __init__(self, monkeypatch):
        self.queue, self.now, self.mode, self.streams = [], 0.0, "default", []
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                cuda.queue.append(lambda: setattr(self, "at", cuda.now))

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        class graph:  # noqa: N801
            def __init__(self, graph):
                pass

            def __enter__(self):
                return self

            def __exit__(self, kind, *_):
                return None

        for name, value in {
            "Event": Event,
            "synchronize": self.synchronize,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
            "current_stream": lambda: "the stream",
            "set_stream": self.streams.append,
            "CUDAGraph": lambda: SimpleNamespace(replay="replay"),
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, seconds):
        self.queue.append(lambda: setattr(self, "now", self.now + seconds))

    def synchronize(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing operation\nmore")
        for step in self.queue:
            step()
        self.queue.clear()


def test_cuda_events_enclose_the_work(suite, monkeypatch):
    cuda, clock = FakeCuda(monkeypatch), suite.timing.CudaClock()
    cuda.work(5.0)  # still queued from before
    assert clock.elapsed(lambda: cuda.work(0.25)) == pytest.approx(0.25)
    calls = [lambda: cuda.work(0.5), lambda: cuda.work(1.0)]
    assert clock.elapsed_after(lambda: cuda.work(3.0), calls) == pytest.approx(1.5)


def test_what_waits_for_the_host_is_not_captured(suite, monkeypatch):
    cuda, clock = FakeCuda(monkeypatch), suite.timing.CudaClock()
    assert clock.capture([lambda: None]) == "replay"
    with pytest.raises(suite.timing.NotCapturableError, match=r"synchronises with the host: called .* operation$"):
        clock.capture([cuda.synchronize])
    assert cuda.mode == "default" and cuda.streams == []
    calls = itertools.count()

    def second_time():
        if next(calls):
            raise RuntimeError("not while capturing")

    with pytest.raises(suite.timing.NotCapturableError, match="capture failed: not while capturing"):
        clock.capture([second_time])
    assert cuda.streams == ["the stream"]


def test_inputs_together_exceed_the_cache(suite):
    rotation, l2 = suite.timing.rotation, suite.timing.l2_bytes(CPU)
    for size in (1, 100, l2 // 7, l2, 10 * l2):
        count = rotation(size, CPU)
        assert count == 64 or count * size > 2 * l2
        assert count >= 2
    assert rotation(10 * l2, CPU) == 2
    buffer = suite.timing.flush_l2(CPU)()
    assert buffer.numel() == 4 * l2 and not buffer.any()


@pytest.mark.gpu
def test_the_cuda_clock_on_a_gpu(suite):
    clock, x = suite.timing.clock_for(torch.device("cuda")), torch.ones(2**20, device="cuda")
    product = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    times = suite.timing.compare({"small": [lambda: x.mul_(1.0)], "large": [lambda: product @ product]}, clock)
    assert times["small"].graph is not None and times["small"].graph.median < times["small"].launched.median * 1.5
    assert 1e-6 < times["small"].best < 1e-4 < 1.3e-4 < times["large"].best < 1e-2
    with pytest.raises(suite.timing.NotCapturableError, match="synchronises"):
        clock.capture([lambda: x.sum().item()])
    assert clock.elapsed(lambda: x.add_(1.0)) > 0 and float(x[0]) == 2.0  # everything still works
    assert suite.timing.peak_extra_bytes(lambda: torch.empty(2**20, device="cuda"), x.device) == 2**22
    rates = suite.floors.measured_rates(torch.device("cuda", 0), clock)
    assert rates.flops > 1e13 and rates.bytes > 1e11 and rates.exps > 1e11


# -------------------------------------------------------------------------------------------------------------- floors


@pytest.mark.parametrize(
    ("shape", "output", "two_passes", "scores"),
    [  # microseconds on an H200
        ((1, 16, 577, 64), 1.73, 3.00, 2.55),
        ((5, 16, 577, 64), 8.6, 15.0, 12.7),
        ((64, 12, 50, 64), 4.6, 6.9, 4.6),
        ((32, 16, 729, 72), 110, 175, 130),
        ((8, 16, 2048, 64), 174, 302, 257),
        ((1, 16, 4096, 80), 109, 173, 128),
        ((1, 16, 16384, 80), 1740, 2767, 2054),
    ],
)
def test_floors(suite, shape, output, two_passes, scores):
    found = suite.floors.floors(*shape, suite.floors.H200)
    assert [x * 1e6 for x in found] == pytest.approx([output, output, two_passes, scores], rel=0.012)


def test_floors_of_windows_are_those_of_a_batch(suite):
    floors, H200 = suite.floors.floors, suite.floors.H200
    assert floors(1, 16, 64, 80, H200, windows=64) == floors(64, 16, 64, 80, H200)
    assert suite.floors.measured_rates(CPU, suite.timing.HostClock()) == H200


# ---------------------------------------------------------------------------------------------------- ways to the same


def tensors(B=2, H=3, N=37, D=16):
    return tuple(torch.randn(B, N, H, D).transpose(1, 2) for _ in range(3))


def test_the_exact_result_in_blocks(suite):
    x = tensors()
    output, scores = suite.attention.exact(*x, rows=10)
    expected = reference.attention_with_scores(*(y.double() for y in x))
    torch.testing.assert_close((output, scores), expected, rtol=1e-12, atol=1e-12)
    assert output.dtype == torch.float64


def test_relative_error(suite):
    error = suite.attention.relative_error
    expected = torch.tensor([1.0, -4.0], dtype=torch.float64)
    assert error(torch.tensor([1.0, -3.0]), expected) == pytest.approx(0.25)
    assert error(torch.tensor([1.0, float("nan")]), expected) == float("inf")
    assert error(None, expected) is None


@pytest.mark.parametrize("name", ["eager", "eager_scores", "sdpa", "sdpa_math", "flex"])
def test_each_way_gives_what_it_says(suite, name):
    way = getattr(suite.ways, name)
    way = way(CPU) if name == "flex" else way
    x = tensors()
    output, scores = way(*x)
    expected = reference.attention_with_scores(*x)
    assert (output is None) == (name == "eager_scores") and (scores is None) == name.startswith("sdpa")
    for found, exact in zip((output, scores), expected):
        if found is not None:
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def install(monkeypatch, name, **functions):
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def per_head(query, key, **options):
    return reference.attention_scores_per_head(query, key)


def test_packages_are_called_with_their_own_conventions(suite, monkeypatch):
    ways, x = suite.ways, tensors()
    expected = reference.attention_with_scores(*x)

    def flash_attn_func(query, key, value):  # [B, N, H, D], and a tuple as some versions give
        assert query.shape == (2, 37, 3, 16)
        return suite.ways.sdpa(*(y.transpose(1, 2) for y in (query, key, value)))[0].transpose(1, 2), None

    def flash_attention(query, key, value, *, return_total_attention):
        assert return_total_attention
        return suite.ways.sdpa(query, key, value)[0], per_head(query, key)

    install(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    install(monkeypatch, "flash_colreduce", flash_colreduce=lambda q, k, reduction: per_head(q, k))
    install(monkeypatch, "flag_attn", flash_attention=flash_attention)
    torch.testing.assert_close(ways.flash_attn()(*x)[0], expected[0])
    torch.testing.assert_close(ways.flash_colreduce()(*x)[1], expected[1])
    torch.testing.assert_close(ways.flag_attention(16)(*x), expected)
    install(monkeypatch, "flash_attn_interface", flash_attn_func=lambda q, k, v: q)  # the newer one goes first
    torch.testing.assert_close(ways.flash_attn()(*x)[0], x[0])
    with pytest.raises(suite.context.UnavailableError, match="head dimension 80"):
        ways.flag_attention(80)


def test_missing_packages_are_named(suite):
    for make in (suite.ways.flash_attn, suite.ways.flash_colreduce, lambda: suite.ways.flag_total_attention(64)):
        with pytest.raises(suite.context.UnavailableError, match="cannot be imported: ModuleNotFoundError"):
            make()


def make_table(suite, context, x):
    return suite.attention.Table(context, [x, x], suite.attention.exact(*(y[::1] for y in x)))


def test_only_right_results_are_timed(suite, context):
    x = tensors()
    table = make_table(suite, context, x)

    def scores(change):
        return lambda: lambda *y: (None, change(reference.attention_scores(*y[:2])))

    table.add("sdpa", lambda: suite.ways.sdpa)
    table.add("ours", lambda: hk.attention_with_scores)
    table.add("zeros", scores(torch.zeros_like))
    table.add("shifted", scores(lambda s: s.roll(1, dims=1)))
    table.add("NaN", scores(lambda s: s * float("nan")))
    table.add("missing", suite.ways.flash_colreduce)
    table.add("broken", lambda: lambda *y: (y[0] @ y[1], None))
    rows = {row["way"]: row for row in table.rows(floor=1e-9)}
    assert [name for name, row in rows.items() if "us" in row] == ["sdpa", "ours"]
    for name in ("zeros", "shifted", "NaN"):
        assert rows[name]["failure"].startswith("wrong scores: error")
    assert rows["missing"]["failure"].startswith("flash_colreduce cannot be imported")
    assert rows["broken"]["failure"].startswith("RuntimeError: ")
    assert rows["ours"]["x ours"] == 1.0 and rows["ours"]["floor us"] == pytest.approx(1e-3)
    assert rows["ours"]["of floor"] == pytest.approx(1e-3 / rows["ours"]["us"])
    assert rows["sdpa"]["x ours"] == pytest.approx(rows["sdpa"]["us"] / rows["ours"]["us"])


def test_ours_is_held_to_tighter_limits(suite, context):
    x = tensors()

    def slightly_off(part):
        def way(*y):
            result = list(hk.attention_with_scores(*y))
            result[part] = result[part] * 1.001
            return tuple(result)

        return lambda: way

    for part, kind in enumerate(("output", "scores")):
        for name in ("ours", "another"):
            table = make_table(suite, context, x)
            table.add("sdpa", lambda: suite.ways.sdpa)
            table.add(name, slightly_off(part))
            failure = table.rows(None)[1].get("failure", "")
            assert failure.startswith(f"wrong {kind}") == (name == "ours")


def test_a_batch_is_checked_at_both_ends(suite, context):
    x = tensors(B=5)

    def wrong_in(image):
        def way(*y):
            scores = reference.attention_scores(*y[:2])
            scores[image] = 0.0
            return None, scores

        return way

    table = suite.attention.Table(context, [x], suite.attention.exact(*(y[::4] for y in x)))
    for image in (0, 4):
        table.add(f"{image}", lambda image=image: wrong_in(image))
    assert all(row["failure"].startswith("wrong scores") for row in table.rows(None))


def test_both_chains_select_as_the_reference(suite):
    generator = torch.Generator().manual_seed(3)
    objects, deeps = (torch.rand(3, 36, generator=generator).argsort(dim=-1) / 36 for _ in range(2))
    features = torch.randn(3, 36, 5)
    for budget in (7, 20, 36):
        expected, _ = reference.select_tokens(objects, deeps, budget=budget, grid=(6, 6), rule=suite.selection.RULE)
        for way in suite.selection.WAYS.values():
            kept, indices = way(features, objects, deeps, budget, (6, 6))
            assert torch.equal(indices, expected)
            assert torch.equal(kept, torch.stack([f[i] for f, i in zip(features, expected)]))


# ------------------------------------------------------------------------------------------------------------ sections


def run_section(suite, context, section, cases, **options):
    """The rows of some of a section's cases, by case and way."""
    module, function = suite.worker.CASES[section]
    every = [case.name for case in getattr(getattr(suite, module), function)(context)]
    events = []
    suite.worker.run_section(section, context, events.append, [name for name in every if name not in cases], **options)
    assert events[0] == {"cases": every}
    found = {event["case"]: event for event in events if event.get("status") not in (None, "running")}
    assert list(found) == cases
    for event in found.values():
        assert event["status"] == "done", event
    json.dumps(events, allow_nan=False)
    return {name: event["rows"] for name, event in found.items()}


@pytest.mark.parametrize("case", ["CLIP-L B=1", "SigLIP B=32", "Qwen windows 4096"])
def test_attention_section(suite, context, case):
    (rows,) = run_section(suite, context, "attention", [case]).values()
    for kind in ("output + scores", "scores only"):
        table = {row["way"]: row for row in rows if row["computes"] == kind}
        assert {"ours", "eager", "sdpa"} <= table.keys()
        assert table["ours"]["score error"] < 1e-5 and table["ours"]["us"] > 0 and table["ours"]["samples"] == 3
        assert (table["ours"]["output error"] is None) == (kind == "scores only")
        assert "us" in table["eager"] and "us" in table["sdpa"]
        assert 0 < table["ours"]["of floor"] < 1


def test_every_shape_of_the_paper_and_its_peers_is_there(suite, context):
    assert suite.attention.SHAPES["CLIP-L B=64"] == (64, 16, 577, 64, 0)
    assert suite.attention.SHAPES["Qwen windows 16384"] == (1, 16, 16384, 80, 64)
    names = [case.name for case in suite.attention.cases(context)]
    assert len(names) == 13 and names == list(suite.attention.SHAPES)
    query = suite.attention.inputs(context, suite.attention.Shape(2, 3, 50, 16), torch.Generator().manual_seed(0))[0]
    assert query.shape == (2, 3, 50, 16) and query.transpose(1, 2).is_contiguous()
    assert float(query.std()) == pytest.approx(2.0, rel=0.05)


def test_selection_section(suite, context):
    (rows,) = run_section(suite, context, "selection", ["CLIP-L 576 to 192, B=8"]).values()
    assert [row["way"] for row in rows] == ["ours", "fixed-size chain", "released chain"]
    assert all(row["us"] > 0 and row["x ours"] > 0 for row in rows)


def test_a_wrong_selection_is_not_timed(suite, context, monkeypatch):
    chain = suite.selection.fixed_size_chain

    def shifted(*arguments):
        kept, indices = chain(*arguments)
        return kept, (indices + 1) % 36

    def broken(*arguments):
        raise ValueError("no")

    ways = {**suite.selection.WAYS, "fixed-size chain": shifted, "released chain": broken}
    monkeypatch.setattr(suite.selection, "WAYS", ways)
    (rows,) = run_section(suite, context, "selection", ["CLIP-L 576 to 192, B=8"]).values()
    assert "us" in rows[0]
    assert rows[1]["failure"].startswith("wrong: ") and "us" not in rows[1]
    assert rows[2]["failure"] == "ValueError: no"


def test_encoder_section(suite, context):
    (rows,) = run_section(suite, context, "encoder", ["CLIP-L/14-336 B=2"]).values()
    ways = {row["way"]: row for row in rows}
    assert list(ways) == ["scored and pruned", "sdpa", "scored", "eager", "released code"]
    assert all(row["us"] > 0 for row in rows)
    assert ways["scored and pruned"]["tokens kept as in float64"] >= 0.97
    assert ways["released code"]["tokens kept as in float64"] > 0.8
    assert ways["scored"]["output error"] == 0.0  # recording leaves the stock bits


def test_a_wrong_encoder_is_not_timed(suite, context, monkeypatch):
    monkeypatch.setattr(suite.encoder._Encoders, "pruned", lambda self: self._pruned(self.pixels + 1).last_hidden_state)
    (case,) = [case for case in suite.encoder.cases(context) if case.name.endswith("B=2")]
    with pytest.raises(RuntimeError, match="pruned encoder: .* of the tokens agree"):
        case.rows()


def test_llava_section(suite, context):
    names = [f"LLaVA-1.5-7B B=2, {way}" for way in ("unpruned", "12 tokens")]
    found = run_section(suite, context, "llava", [*names, "LLaVA-NeXT-7B"])
    (unpruned,), (pruned,) = (found[name] for name in names)
    assert unpruned["prompt tokens"] == 48 + 36 and pruned["prompt tokens"] == 48 + 12
    assert pruned["logit error"] < 0.05
    assert all(row["prefill ms"] > 0 and "decode ms" in row for row in (unpruned, pruned))
    assert "llava_next" in found["LLaVA-NeXT-7B"][0]["failure"]


def test_a_pruned_prefill_with_wrong_logits_is_not_timed(suite, context, monkeypatch):
    prefill = suite.llava._Llava.prefill

    def other_prompt(self, inputs):
        return prefill(self, {**inputs, "input_ids": inputs["input_ids"].roll(-1, dims=1)})

    monkeypatch.setattr(suite.llava._Llava, "prefill", other_prompt)
    (case,) = [case for case in suite.llava.cases(context) if case.name == "LLaVA-1.5-7B B=1, 12 tokens"]
    with pytest.raises(RuntimeError, match="pruned prefill"):
        case.rows()


def test_real_sizes(suite):
    config = suite.models.llava_config(tiny=False)
    with torch.device("meta"):
        model = suite.llava.LlavaForConditionalGeneration(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.06e9, rel=0.01)
    assert config.image_seq_length == 576 and config.vision_config.num_hidden_layers == 24
    assert config.text_config.eos_token_id is None


# -------------------------------------------------------------------------------------------- one section in a process


def scripted(suite, monkeypatch, cases):
    monkeypatch.setattr(suite.selection, "cases", lambda context: cases)


def test_what_a_case_raises_is_reported_and_the_next_one_runs(suite, context, monkeypatch):
    def raises(error):
        def rows():
            raise error

        return rows

    Case = suite.context.Case
    scripted(
        suite,
        monkeypatch,
        [
            Case("broken", 1.0, raises(KeyError("x"))),
            Case("memory", 1.0, raises(torch.OutOfMemoryError("need 3 GiB\nmore"))),
            Case("absent", 1.0, raises(suite.context.UnavailableError("needs a GPU"))),
            Case("seen", 1.0, raises(AssertionError("skipped cases do not run"))),
            Case("fine", 1.0, lambda: [{"way": "ours", "us": 1.23456789, "bad": float("nan"), "n": [float("inf")]}]),
        ],
    )
    events = []
    suite.worker.run_section("selection", context, events.append, ["seen"])
    found = {event["case"]: event for event in events if event.get("status") not in (None, "running")}
    assert {name: event["status"] for name, event in found.items()} == {
        "broken": "failed",
        "memory": "failed",
        "absent": "skipped",
        "fine": "done",
    }
    assert found["broken"]["reason"] == "KeyError: 'x'"
    assert found["memory"]["reason"] == "out of memory: need 3 GiB"
    assert found["absent"]["reason"] == "needs a GPU"
    assert found["fine"]["rows"] == [{"way": "ours", "us": 1.2346, "bad": "nan", "n": ["inf"]}]


def test_a_case_that_does_not_fit_is_skipped_and_a_shorter_one_runs(suite, monkeypatch):
    Case = suite.context.Case
    scripted(suite, monkeypatch, [Case("long", 50.0, list), Case("short", 1.0, list)])
    context, events = suite.context.Context(CPU, suite.timing.HostClock(), quick=False), []
    suite.worker.run_section("selection", context, events.append, seconds=20.0)
    skipped, running, done = events[1:]
    assert skipped["status"] == "skipped" and "takes about 50 s, and 20 s of" in skipped["reason"]
    assert running == {"case": "short", "status": "running", "limit": 24.0} and done["status"] == "done"


def test_a_device_that_answers_no_more_ends_the_process(suite, monkeypatch):
    def dead():
        raise RuntimeError("an illegal memory access\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    context = suite.context.Context(torch.device("cuda", 0), suite.timing.HostClock(), quick=True)
    with pytest.raises(suite.context.PoisonedError, match="^flash: ValueError: first$"):
        context.failure("flash", ValueError("first\nsecond"))
    scripted(suite, monkeypatch, [suite.context.Case("a", 1.0, list), suite.context.Case("b", 1.0, list)])
    events = []
    with pytest.raises(suite.context.PoisonedError, match="^an illegal memory access$"):
        suite.worker.run_section("selection", context, events.append)
    assert [event["case"] for event in events if event.get("status") == "done"] == ["a"]


# ----------------------------------------------------------------------------------------------------------- conductor


def python(suite, code, seconds=20.0):
    deadline = suite.conductor.Deadline(time.monotonic() + seconds)
    return list(suite.conductor.stream([sys.executable, "-c", code], deadline))


def test_stream_gives_lines_and_exit_status(suite):
    found = python(suite, "import sys; print('one'); print('two', file=sys.stderr); sys.exit(4)")
    assert found[-1] == 4
    assert sorted(found[:-1]) == [("one", False), ("two", True)]


def test_stream_kills_at_the_deadline_children_too(suite, tmp_path):
    child = "import time, pathlib, sys; time.sleep(2); pathlib.Path(sys.argv[1]).write_text('alive')"
    code = (
        f"import subprocess, sys; print(1); subprocess.run([sys.executable, '-c', {child!r}, {str(tmp_path / 'x')!r}])"
    )
    began = time.monotonic()
    assert python(suite, code, seconds=1.0)[-1] == -signal.SIGKILL
    assert time.monotonic() - began < 2.0
    time.sleep(max(0.0, began + 3.5 - time.monotonic()))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("device", "kept"), [("cuda", False), ("cpu", True)])
def test_the_interpreter_never_times_a_gpu(suite, monkeypatch, device, kept):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.environ.get('TRITON_INTERPRET'))"
    deadline = suite.conductor.Deadline(time.monotonic() + 20.0)
    line, _ = suite.conductor.stream([sys.executable, "-c", code, device], deadline)
    assert line.text == ("1" if kept else "None")


class Script:
    """Stands in for `stream`: each process plays the next list of events, and ends with its last entry."""

    def __init__(self, suite, monkeypatch, *processes):
        self.processes, self.commands, self.deadlines = list(processes), [], []
        self._conductor = suite.conductor
        monkeypatch.setattr(suite.conductor, "stream", self.stream)

    def stream(self, command, deadline):
        self.commands.append(command)
        for entry in self.processes.pop(0):
            if isinstance(entry, dict):
                yield self._conductor.Line(self._conductor.EVENT + json.dumps(entry), False)
                self.deadlines.append(deadline.at)
            elif isinstance(entry, str):
                yield self._conductor.Line(entry, True)
            else:
                yield entry


def a_suite(suite, tmp_path, budget=500.0, **options):
    said = []
    options = {"device": "cuda", "quick": False, "flush": False, "command": "x", "commit": "c0ffee"} | options
    made = suite.conductor.Suite(tmp_path, budget=budget, say=said.append, **options)
    return made, said


def running(name, limit=44.0):
    return {"case": name, "status": "running", "limit": limit}


def done(name, rows=()):
    return {"case": name, "status": "done", "seconds": 1.0, "rows": list(rows)}


def test_a_crash_costs_one_case(suite, tmp_path, monkeypatch):
    cases = {"cases": ["a", "b", "c", "d"]}
    script = Script(
        suite,
        monkeypatch,
        [{"machine": {"platform": "Linux"}}, cases, running("a"), done("a"), running("b"), "Segmentation fault", -11],
        [cases, running("c"), {"case": "c", "status": "failed", "reason": "PoisonedError", "seconds": 1.0}, 3],
        [cases, running("d"), done("d"), 0],
    )
    made, said = a_suite(suite, tmp_path, flush=True)
    assert made.run(["selection"]) is False
    section = made.results["sections"]["selection"]
    assert section["status"] == "done"
    assert [(case["case"], case["status"]) for case in section["cases"]] == [
        ("a", "done"),
        ("b", "failed"),
        ("c", "failed"),
        ("d", "done"),
    ]
    assert section["cases"][1]["reason"] == "the process ended with status -11: Segmentation fault"
    assert script.commands[0][2:5] == ["bench.gpu_suite.worker", "selection", "--device"]
    assert "--flush-l2" in script.commands[0] and "--quick" not in script.commands[0]
    assert script.commands[2][-4:] == ["--skip", "a", "b", "c"]
    assert sum("another process goes on" in line for line in said) == 2
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == made.results and written["machine"] == {"platform": "Linux"} and written["commit"] == "c0ffee"
    assert "Segmentation fault" in (tmp_path / "log.txt").read_text()
    assert "status -11: Segmentation fault" in (tmp_path / "results.md").read_text()


def test_a_case_that_hangs_is_stopped_at_its_own_limit(suite, tmp_path, monkeypatch):
    cases = {"cases": ["a", "b"]}
    script = Script(
        suite,
        monkeypatch,
        [cases, running("a"), done("a"), running("b", None), done("b"), running("c"), -9],
        [cases, 0],
    )
    made, _ = a_suite(suite, tmp_path)
    began = time.monotonic()
    made.run(["selection"])
    start, first, after, unlimited, *_ = (round(at - began) for at in script.deadlines)
    assert first == 44 and start == after == unlimited == 517  # 500, less the reserve, more the grace
    assert made.results["sections"]["selection"]["cases"][-1]["reason"] == "stopped after 0 s"


def test_a_section_that_cannot_start_says_so_once(suite, tmp_path, monkeypatch):
    script = Script(suite, monkeypatch, [{"fatal": "PyTorch finds no CUDA device"}, 1])
    made, _ = a_suite(suite, tmp_path)
    assert made.run(["attention"]) is False
    reason = "the process ended with status 1: PyTorch finds no CUDA device"
    assert made.results["sections"]["attention"] | {"seconds": 0} == {
        "status": "failed",
        "reason": reason,
        "cases": [],
        "seconds": 0,
    }
    assert len(script.commands) == 1
    assert suite.report.failures(made.results) == [f"attention: {reason}"]


def test_cases_that_were_not_reached_are_listed(suite, tmp_path, monkeypatch):
    Script(suite, monkeypatch, [{"cases": ["a", "b", "c"]}, running("a"), "late", -9])
    made, _ = a_suite(suite, tmp_path)
    monkeypatch.setattr(made, "end", time.monotonic() + 9.0)
    monkeypatch.setattr(suite.conductor, "SECTIONS", {"selection": suite.conductor.Section(1.0, 1.0)})
    made.run(["selection"])
    cases = made.results["sections"]["selection"]["cases"]
    assert [(case["case"], case["status"], case["reason"]) for case in cases[1:]] == [
        ("b", "skipped", "not reached"),
        ("c", "skipped", "not reached"),
    ]


def test_time_is_shared_by_weight_and_what_is_left_over_is_passed_on(suite, tmp_path, monkeypatch):
    Section = suite.conductor.Section
    sections = {"attention": Section(0.2, 5.0), "selection": Section(0.1, 5.0), "llava": Section(0.1, 300.0)}
    monkeypatch.setattr(suite.conductor, "SECTIONS", sections)
    made, said = a_suite(suite, tmp_path, budget=403.0)
    given = []

    def measure(name, record, deadline):
        given.append((name, round(deadline - time.monotonic())))
        record["status"] = "done"

    monkeypatch.setattr(made, "_measure", measure)
    assert made.run(list(sections)) is True
    assert given == [("attention", 200), ("selection", 200), ("llava", 400)]
    sections["llava"] = Section(0.1, 500.0)
    made.run(list(sections))
    assert made.results["sections"]["llava"]["status"] == "skipped"
    assert "llava: skipped, needs 500 s; its share of the time left is 400 s" in said[-1]


def test_commit_from_git_files(suite, tmp_path):
    commit_of, git = suite.conductor.commit_of, tmp_path / ".git"
    assert commit_of(tmp_path) == "unknown"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) == "unknown"
    (git / "packed-refs").write_text("# pack\nbbbb refs/heads/other\naaaa refs/heads/main\n")
    assert commit_of(tmp_path) == "aaaa"
    (git / "refs" / "heads" / "main").write_text("cccc\n")
    assert commit_of(tmp_path) == "cccc"
    (git / "HEAD").write_text("dddd\n")
    assert commit_of(tmp_path) == "dddd"


# --------------------------------------------------------------------------------------------------------------- tests

PYTEST_OUTPUT = """\
tests/test_gpu_a.py::test_one[bf16 x] PASSED                             [ 10%]
tests/test_gpu_a.py::test_two SKIPPED (no second GPU)                    [ 20%]
tests/test_gpu_a.py::test_three FAILED                                   [ 30%]
tests/test_gpu_a.py::test_four ERROR                                     [ 40%]
[gw3] [ 50%] PASSED tests/test_gpu_b.py::test_five[a b]
[gw0] [ 60%] FAILED tests/test_gpu_b.py::test_six
tests/test_gpu_b.py::test_seven
=================================== FAILURES ===================================
FAILED tests/test_gpu_a.py::test_three - AssertionError: scores differ
ERROR tests/test_gpu_a.py::test_four - RuntimeError: CUDA
FAILED tests/test_gpu_b.py::test_six - ValueError
"""


def test_outcomes_are_read_off_pytest(suite):
    counts = suite.gpu_tests.Counts()
    shown = [counts.read(line) for line in PYTEST_OUTPUT.splitlines()]
    assert [text for text in shown if text] == [
        "failed tests/test_gpu_a.py::test_three",
        "error tests/test_gpu_a.py::test_four",
        "failed tests/test_gpu_b.py::test_six",
    ]
    found = counts.summary(1)
    assert found["outcomes"] == {"passed": 2, "skipped": 1, "failed": 2, "error": 1}
    assert found["failed tests"] == [
        "tests/test_gpu_a.py::test_three - AssertionError: scores differ",
        "tests/test_gpu_a.py::test_four - RuntimeError: CUDA",
        "tests/test_gpu_b.py::test_six - ValueError",
    ]
    assert found["status"] == "failed" and found["reason"] == "1 error, 2 failed, 2 passed, 1 skipped"


def test_every_twentieth_test_shows(suite):
    counts = suite.gpu_tests.Counts()
    shown = [counts.read(f"tests/test_a.py::test_{i} PASSED [ 1%]") for i in range(45)]
    assert [text for text in shown if text] == ["20 tests done", "40 tests done"]
    assert counts.summary(0)["status"] == "done" and counts.summary(0)["reason"] == "45 passed"


def test_how_pytest_ended(suite, monkeypatch):
    counts = suite.gpu_tests.Counts()
    counts.read("tests/test_a.py::test_a PASSED [ 1%]")
    assert counts.summary(-9) | {"outcomes": 0} == {
        "outcomes": 0,
        "failed tests": [],
        "status": "failed",
        "reason": "stopped before the end (1 passed)",
    }
    assert counts.summary(5)["status"] == "skipped"
    counts.read("ImportError: no module")
    assert counts.summary(4) | {} == counts.summary(4) and counts.summary(4)["reason"].endswith(
        "ImportError: no module"
    )
    monkeypatch.setattr(suite.gpu_tests.importlib.util, "find_spec", lambda name: None)
    assert counts.summary(1)["reason"] == "pytest is not installed" and counts.summary(1)["status"] == "skipped"


def test_the_command_runs_the_gpu_tests_and_nothing_else(suite, tmp_path):
    made, _ = a_suite(suite, tmp_path, quick=True, device="cpu")
    record = {}
    made._tests("tests", record, time.monotonic() + 60.0)
    assert record["status"] == "done"
    listed = (tmp_path / "tests.log").read_text()
    assert "tests/test_gpu_suite.py::test_the_cuda_clock_on_a_gpu" in listed
    assert "tests/test_gpu_suite.py::test_commit_from_git_files" not in listed
    assert "-v" in suite.gpu_tests.command("python", quick=False)


# -------------------------------------------------------------------------------------------------------------- report


def a_report():
    def row(way, us, graph_us=None, **more):
        return {"way": way, "us": us} | ({} if graph_us is None else {"graph us": graph_us}) | more

    fused, alone = {"computes": "output + scores"}, {"computes": "scores only"}
    clip = [
        row("ours", 30.0, 12.0, **fused),
        row("sdpa", 25.0, 10.0, **fused),
        row("sdpa cudnn", 40.0, 8.0, **fused),
        row("eager", 99.0, **fused, **{"no graph": "it waits"}),
        {"way": "flash-attn", "failure": "flash_attn cannot be imported", **fused},
        row("ours", 20.0, 5.0, **alone),
        row("flash-colreduce", 30.0, 16.0, **alone),
    ]
    paths = [
        row("passes", 50.0),
        row("passes, launch 2: scores_kernel 64x64 w4 s3", 6.0, 4.0),
        row("cudnn, launch 1: scores_kernel 64x64 w4 s3", 6.0, 3.0),
        row("FlagAttention, scores pass", 9.0, 6.0),
        {"way": "sweeps", "failure": "wrong: errors 1"},
        {"way": "strip", "failure": "OutOfResources: shared memory"},
    ]
    selection = [row("ours", 10.0, 4.0), row("fixed-size chain", 60.0, 30.0), row("released chain", 150.0)]
    encoder = [row("scored and pruned", 5000.0, 990.0), row("sdpa", 4000.0, 1000.0), row("released code", 11000.0)]
    sections = {
        "attention": [
            done("CLIP-L B=1", clip),
            done("CLIP-L B=8", clip),
            done("Qwen 16384", [row("ours", 1.0, **{"extra MiB": 100.0}, **fused)]),
            {"case": "DeiT B=64", "status": "skipped", "reason": "no time"},
        ],
        "paths": [done("CLIP-L B=8", paths)],
        "selection": [done("CLIP-L 576 to 192, B=1", selection)],
        "encoder": [done("CLIP-L/14-336 B=8", encoder), {"case": "x", "status": "failed", "reason": "out of memory"}],
    }
    return {
        "command": "python -m bench.gpu_suite",
        "commit": "c0ffee",
        "date": "today",
        "quick": False,
        "machine": {
            "versions": {"torch": "2.11"},
            "devices": ["cuda:0: H200"],
            "rates": {"flops": 7.9e14, "bytes": 4.3e12, "exps": 4e12},
        },
        "sections": {
            **{name: {"status": "done", "cases": cases} for name, cases in sections.items()},
            "tests": {"status": "failed", "reason": "1 failed", "failed tests": ["tests/a.py::b"], "cases": []},
        },
    }


def test_goals_are_computed_from_the_rows(suite):
    values = {goal.text: (goal.value, goal.verdict) for goal in suite.report.goals(a_report())}
    measured = {text: value for text, value in values.items() if value[0] is not None}
    assert measured == {
        "CLIP-L B=1: output + scores / fastest SDPA": (1.5, "realistic"),
        "CLIP-L B=8: output + scores / fastest SDPA": (1.5, "realistic"),
        "CLIP-L B=8: flash-colreduce / scores only": (pytest.approx(3.2), "moonshot"),
        "CLIP-L B=8: FlagAttention's scores pass / ours": (2.0, "realistic"),
        "selection: the eager torch chain / ours, launched": (15.0, "realistic"),
        "selection: the torch chain without waits / ours, in CUDA graphs": (7.5, "moonshot"),
        "encoder B=8: scored and pruned / SDPA": (0.99, "realistic"),
        "encoder B=8: released code / scored and pruned, launched": (2.2, "realistic"),
        "Qwen 16384: extra memory, in copies of the queries": (2.5, "moonshot"),
    }
    assert values["V-JEPA2 B=8: output + scores / fastest SDPA"] == (None, "not measured")
    assert suite.report.Goal("", 1.0, 0.9, 1.1).verdict == "missed"


def test_failures_are_defects_and_not_what_is_absent(suite):
    results = a_report()
    assert suite.report.failures(results) == [
        "paths, CLIP-L B=8, sweeps: wrong: errors 1",
        "encoder, x: out of memory",
        "tests: 1 failed",
    ]
    results["sections"]["attention"]["cases"][0]["rows"][0] = {"way": "ours", "failure": "wrong", "computes": "O"}
    assert suite.report.failures(results)[0] == "attention, CLIP-L B=1, O: wrong"


def test_markdown(suite):
    text = suite.report.markdown(a_report())
    assert "790 TFLOP/s" in text and "4.30 TB/s" in text and "commit c0ffee" in text and "- cuda:0: H200" in text
    assert "| CLIP-L B=1 | output + scores | sdpa cudnn | 40 | 8 |" in text
    assert "- flash-attn: flash_attn cannot be imported: CLIP-L B=1, CLIP-L B=8" in text
    assert "- eager, no graph: it waits: CLIP-L B=1, CLIP-L B=8" in text
    assert "- skipped: no time: DeiT B=64" in text
    assert "## tests: failed" in text and "- tests/a.py::b" in text
    assert "dry run" not in text and "dry run" in suite.report.markdown(a_report() | {"quick": True})
    lines = text.splitlines()
    for head in (i for i, line in enumerate(lines) if line.startswith("|---")):
        table = itertools.takewhile(lambda line: line.startswith("|"), lines[head - 1 :])
        assert len({line.count("|") for line in table}) == 1


def test_a_case_in_one_line(suite):
    line = suite.report.case_line(a_report()["sections"]["selection"]["cases"][0])
    assert line == "1.0 s; ours 4 us"
    rows = [{"way": "ours", "failure": "wrong"}, {"way": "sdpa", "us": 1.0, "x ours": 0.5, "x ours, graph": 0.75}]
    assert suite.report.case_line(done("a", rows)) == "1.0 s; ours FAILED, wrong, sdpa 0.75x"
    rows = [{"way": "192 tokens", "prefill ms": 12.5, "decode ms": 3.25}]
    assert suite.report.case_line(done("a", rows)).endswith("192 tokens prefill 12.5 ms, decode 3.25 ms")


# ------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "sections"),
    [
        ([], "tests attention encoder selection llava paths"),
        (["--tune", "--skip-tests"], "attention encoder selection llava paths tune"),
        (["--only", "paths", "attention"], "attention paths"),
        (["--only", "paths", "--tune"], "paths tune"),
    ],
)
def test_sections_of_a_command_in_order_of_importance(suite, tmp_path, monkeypatch, arguments, sections):
    chosen = []
    monkeypatch.setattr(suite.conductor.Suite, "run", lambda self, names: chosen.extend(names) or True)
    assert suite.__main__.main([*arguments, "--out", str(tmp_path), "--commit", "abc"]) == 0
    assert " ".join(chosen) == sections


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--budget-s", "0"], ["--only", "nothing"]])
def test_impossible_commands(suite, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.__main__.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_dry_run_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_suite", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    run = subprocess.run([*command, "--only", "selection"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (section,) = results["sections"].values()
    assert section["status"] == "done" and len(section["cases"]) == 6
    assert all(row["us"] > 0 for case in section["cases"] for row in case["rows"])
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("python -m bench.gpu_suite --quick --device cpu")
    assert "A dry run" in (tmp_path / "results.md").read_text()


def test_without_a_gpu_it_fails_and_says_why(suite, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "bench.gpu_suite.worker", "selection"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == '@event {"fatal": "PyTorch finds no CUDA device"}\n'


def test_every_path_of_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-c", _PATHS, str(ROOT)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    paths, tuned = (json.loads(line) for line in run.stdout.splitlines())
    timed = {row["way"] for row in paths if "us" in row}
    assert {"strip", "sweeps", "passes", "scores only, sweeps", "scores only, passes"} <= timed
    assert any(way.startswith("passes, launch 2: scores_kernel") for way in timed)
    assert not any(row.get("failure", "").startswith("wrong") for row in paths + tuned)
    for kernel in ("sweeps", "output and LSE", "LSE alone", "scores pass", "strip"):
        assert any(row["way"].startswith(kernel) and row["us"] > 0 for row in tuned)


_PATHS = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from bench.gpu_suite import attention, context, paths, timing
attention.quick = lambda shape: shape._replace(B=1, H=1, N=20, D=16)
quick = context.Context(torch.device("cpu"), timing.HostClock(), quick=True)
for cases in (paths.path_cases, paths.tune_cases):
    print(json.dumps(cases(quick)[0].rows()))
"""
