"""What bench/gpu_suite measures and how: its clockwork on a scripted clock, its sections on a CPU at tiny sizes."""

import itertools
import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.patch.language import CACHE

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


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
    (times,) = suite.timing.compare({"a": [clock.call(5.1e-5)] * 3}, clock, samples=5).values()
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

    (times,) = suite.timing.compare({"a": [clock.call(1e-4)]}, clock, samples=2, prepare=prepare).values()
    assert times.launched.median == pytest.approx(1e-4) and clock.prepared > 2 and clock.captured == []


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

        class graph:
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
            "_sleep": lambda clocks: self.work(clocks * 1e-9),
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
    assert cuda.now > 5.25 + 5e-5  # it was busy when the work arrived, which is not counted
    calls = [lambda: cuda.work(0.5), lambda: cuda.work(1.0)]
    before = cuda.now
    assert clock.elapsed_after(lambda: cuda.work(3.0), calls) == pytest.approx(1.5)
    assert cuda.now - before == pytest.approx(2 * 3.0 + 1.5)


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
    assert suite.timing.device_seconds(buffer.zero_, CPU) is None


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
    seconds = suite.timing.device_seconds(lambda: product @ product, x.device)
    assert times["large"].best / 2 < seconds < times["large"].best * 2
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
    objects, deeps = (torch.rand(3, 144, generator=generator).argsort(dim=-1) / 144 for _ in range(2))
    features = torch.randn(3, 144, 5)
    for budget, anchors in ((20, 0), (30, 1), (120, 2), (144, 3)):
        options = {"budget": budget, "grid": (12, 12), "rule": suite.selection.RULE}
        expected, roles = reference.select_tokens(objects, deeps, **options)
        assert (roles == 1).sum(dim=1).tolist() == [anchors] * 3
        for way in suite.selection.WAYS.values():
            kept, indices = way(features, objects, deeps, budget, (12, 12))
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
        return kept, (indices + 1) % 144

    def broken(*arguments):
        raise ValueError("no")

    ways = {**suite.selection.WAYS, "fixed-size chain": shifted, "released chain": broken}
    monkeypatch.setattr(suite.selection, "WAYS", ways)
    (rows,) = run_section(suite, context, "selection", ["CLIP-L 576 to 192, B=8"]).values()
    assert "us" in rows[0]
    assert rows[1]["failure"].startswith("wrong: ") and "us" not in rows[1]
    assert rows[2]["failure"] == "ValueError: no"


def test_operators_section(suite, context):
    found = run_section(suite, context, "operators", list(suite.operators.OPERATORS))
    assert len(found) == 8
    for name, rows in found.items():
        assert [row["way"] for row in rows] == list(suite.operators.OPERATORS[name].ways)
        assert all(row.get("us", 0) > 0 for row in rows), (name, rows)


def test_a_wrong_operator_is_not_timed(suite, context, monkeypatch):
    name, operator = next(iter(suite.operators.OPERATORS.items()))
    ways = {"ours": operator.ways["ours"], "torch loop": lambda *inputs: operator.ways["ours"](*inputs).flip(-1)}
    monkeypatch.setitem(suite.operators.OPERATORS, name, operator._replace(ways=ways))
    (rows,) = run_section(suite, context, "operators", [name]).values()
    assert "us" in rows[0] and rows[1]["failure"].startswith("wrong: ") and "us" not in rows[1]


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
    with pytest.raises(RuntimeError, match=r"pruned encoder: .* of the tokens agree"):
        case.rows()


@pytest.mark.parametrize(
    ("model", "image", "kept"),
    [("LLaVA-1.5-7B B=2", 36, 12), ("LLaVA-NeXT-7B B=1", 5 * 36 + 12, 60 + 12)],  # 12 newlines
    ids=["llava", "llava_next"],
)
def test_llava_section(suite, context, model, image, kept):
    names = [f"{model}, unpruned", f"{model}, {60 if 'NeXT' in model else 12} tokens"]
    found = run_section(suite, context, "llava", names)
    (unpruned,), (pruned,) = (found[name] for name in names)
    assert unpruned["prompt tokens"] == 48 + image and pruned["prompt tokens"] == 48 + kept
    assert pruned["logit error"] < 0.05
    assert all(row["prefill ms"] > 0 and "decode ms" in row for row in (unpruned, pruned))


def test_a_pruned_prefill_with_wrong_logits_is_not_timed(suite, context, monkeypatch):
    prefill = suite.llava._Llava.prefill

    def other_prompt(self, inputs):
        return prefill(self, {**inputs, "input_ids": inputs["input_ids"].roll(-1, dims=1)})

    monkeypatch.setattr(suite.llava._Llava, "prefill", other_prompt)
    (case,) = [case for case in suite.llava.cases(context) if case.name == "LLaVA-1.5-7B B=1, 12 tokens"]
    with pytest.raises(RuntimeError, match="pruned prefill: the logits are off"):
        case.rows()
    cache = SimpleNamespace(get_seq_length=lambda: 5)
    monkeypatch.setattr(suite.llava._Llava, "prefill", lambda *x: prefill(*x) and {CACHE: cache})
    with pytest.raises(RuntimeError, match="expected 60 tokens in the cache, got 5"):
        case.rows()


@pytest.mark.parametrize("tiled", [False, True])
def test_real_sizes(suite, tiled):
    kind, config = suite.models.llava_model(tiled, tiny=False)
    with torch.device("meta"):
        model = kind(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.06e9, rel=0.01)
    assert config.vision_config.num_hidden_layers == 24 and config.text_config.eos_token_id is None


# ------------------------------------------------------------------------------------------------------------ sanitizer

FAKE_TOOL = """#!/usr/bin/env python3
import os, subprocess, sys
assert os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
tool = sys.argv[sys.argv.index("--tool") + 1]
if tool == "memcheck":
    print("========= COMPUTE-SANITIZER\\ncalls: 7\\n========= ERROR SUMMARY: 0 errors")
else:
    print("========= Race reported between Write and Read\\n========= RACECHECK SUMMARY: 1 hazard")
    sys.exit(int(sys.argv[sys.argv.index("--error-exitcode") + 1]))
"""


def test_sanitizer_makes_its_calls_and_checks_them(suite, context, monkeypatch):
    (memcheck, racecheck) = suite.sanitizer.cases(context)
    assert [memcheck.name, racecheck.name] == ["memcheck", "racecheck"]
    assert memcheck.rows()[0]["calls"] == 7
    monkeypatch.setattr(suite.sanitizer.hk, "attention_with_scores", lambda q, k, v, **_: (q, k.float().sum((1, 3))))
    with pytest.raises(AssertionError, match="not close"):
        suite.sanitizer.calls(torch.device("cpu"))


def test_sanitizer_reads_what_the_tool_finds(suite, monkeypatch, tmp_path):
    context = suite.context.Context(torch.device("cuda:0"), suite.timing.HostClock(), quick=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    memcheck, racecheck = suite.sanitizer.cases(context)
    with pytest.raises(suite.context.UnavailableError, match="not installed"):
        memcheck.rows()
    (tmp_path / "compute-sanitizer").write_text(FAKE_TOOL.replace("/usr/bin/env python3", sys.executable))
    (tmp_path / "compute-sanitizer").chmod(0o755)
    assert memcheck.rows() == [{"way": "memcheck", "calls": 7, "found": "ERROR SUMMARY: 0 errors"}]
    with pytest.raises(RuntimeError, match="status 9: Race reported between Write and Read"):
        racecheck.rows()
