"""`hiprune demo`: HiPrune on real photographs, side by side with the ways it replaces. Needs `hiprune-kernels[demo]`.

Four ways to encode an image for LLaVA-1.5 and to generate from it are run interleaved in one process: the released
code's (eager attention, every layer's attention matrices, selection in PyTorch), stock eager, stock SDPA, and
`apply_hiprune`. Their results are checked before any figure is shown.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from . import reference
from .budget import anchor_count, resolve_budget
from .cli_common import aligned
from .demo_answers import SHOWN, answer_rows, answer_scenes, answers_markdown, markdown_table
from .demo_photos import keep_of_photographs, photos_markdown
from .efficiency import memory_kib, reset_peak
from .environment import environment
from .loading import CLIP_L_14_336, LoadedEncoder, load_encoder, queries_and_keys
from .patch import hiprune, last_selection, record_scores
from .visualize import draw_overview, optional_import

if TYPE_CHECKING:
    from PIL.Image import Image

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")  # inside scikit-image's wheel: nothing is downloaded
RULE = "official"  # of every way here, so that they keep the same tokens
NEW_TOKENS = 8
SECONDS, QUICK_SECONDS = (
    35.0,
    6.0,
)  # spent on timed rounds; a slow machine gets fewer of them, but at least 3 (quick: 1)
WAYS = ("released code", "eager", "sdpa", "hiprune_kernels")
_IMAGE_TOKEN, _VOCABULARY = 32000, 32064  # LLaVA-1.5's


@dataclass
class Run:
    """What one way did with one image."""

    prompt: Tensor  # [P, C], the embeddings that the language model saw
    kept: Tensor | None  # [K] int64, None where every token is kept
    encoder_ms: float  # vision encoder, selection and projector
    generate_ms: float
    peak_mib: float | None  # the encoder's highest memory above what the process held before


@dataclass
class Row:
    """A line of the table; times are medians."""

    way: str
    encoder_ms: float
    speedup: float  # the released code's encoder time over this one's
    peak_mib: float | None
    generate_ms: float
    image_tokens: int
    prompt_tokens: int
    encoder_samples_ms: list[float]


@dataclass
class Agreement:
    """One photograph's kept tokens against those of the float64 reference."""

    photo: str
    equal: dict[str, int]  # per way: how many of its tokens the reference keeps too
    kept: int
    score_error: float  # largest error of a float32 score, over the largest score
    gap: float  # smallest distance of a kept from a passed-over score, so scaled: closer ones rounding may swap
    picture: str


# -------------------------------------------------------------------------------------------------------- measurements


class _Meter:
    """Watches one prompt from the vision encoder's start to the projector's end, and what the language model sees."""

    def __init__(self, llava: LlavaForConditionalGeneration) -> None:
        self._prompt: Tensor | None = None
        self._inner = llava.model

    def __enter__(self) -> _Meter:
        inner = self._inner
        self._handles = (
            inner.vision_tower.register_forward_pre_hook(self._start),
            inner.multi_modal_projector.register_forward_hook(self._stop),
            inner.language_model.layers[0].register_forward_pre_hook(self._see_prompt, with_kwargs=True),
        )
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, module: torch.nn.Module, args: tuple) -> None:
        self._held = reset_peak()
        self._begun = time.perf_counter()

    def _stop(self, module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        self.encoder_ms = (time.perf_counter() - self._begun) * 1e3
        peak = memory_kib("VmHWM")
        self.peak_mib = None if self._held is None or peak is None else (peak - self._held) / 1024

    @property
    def prompt(self) -> Tensor:
        """The embeddings that the language model saw, [P, C]."""
        if self._prompt is None:
            raise RuntimeError("prompt: expected the language model to run, but it did not")
        return self._prompt

    def _see_prompt(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._prompt is None:  # the first call is the prefill, later ones see one token each
            self._prompt = (args[0] if args else kwargs["hidden_states"])[0].clone()


# ------------------------------------------------------------------------------------------------------- the four ways


def _small_llava(loaded: LoadedEncoder, seed: int) -> LlavaForConditionalGeneration:
    """LLaVA-1.5's architecture around the encoder, with a small random language model."""
    vision = loaded.encoder.config
    text = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=_VOCABULARY,
        bos_token_id=1,
        eos_token_id=None,  # so that every run generates equally many tokens
        pad_token_id=0,
    )
    stand_in = copy.deepcopy(vision)
    stand_in.num_hidden_layers = 1  # a second full encoder would be made only to be replaced
    config = LlavaConfig(
        vision_config=stand_in,
        text_config=text,
        image_token_index=_IMAGE_TOKEN,
        image_seq_length=math.prod(loaded.grid),
        vision_feature_layer=loaded.feature_layer - vision.num_hidden_layers - 1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llava = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    llava.model.vision_tower = loaded.encoder
    llava.config.vision_config = vision
    return llava


def _released_selection(object_scores: Tensor, deep_scores: Tensor, budget: int, grid: tuple[int, int]) -> Tensor:
    """The PyTorch chain of the authors' released code for one image: [N] means over queries -> ascending [budget]."""
    anchors = object_scores.topk(anchor_count(budget, rule=RULE)).indices
    around = [anchors, anchors - 1, anchors + 1, anchors - grid[1], anchors + grid[1]]
    taken = torch.cat(around).clamp(0, len(object_scores) - 1).unique()
    rest = deep_scores.clone()
    rest[taken] -= 1.0
    registers = rest.topk(budget - len(taken)).indices
    return torch.cat([taken, registers]).sort().values


class _Ways:
    """Encodes an image and generates from it, in each of the ways."""

    def __init__(self, loaded: LoadedEncoder, budget: int, seed: int) -> None:
        self.loaded, self.budget, self.llava = loaded, budget, _small_llava(loaded, seed)
        words = torch.randint(3, _IMAGE_TOKEN, (40,), generator=torch.Generator().manual_seed(seed))
        image = torch.full((math.prod(loaded.grid),), _IMAGE_TOKEN)
        self.parts = tuple(part[None] for part in (torch.cat([torch.tensor([1]), words[:5]]), image, words[5:]))
        self.input_ids = torch.cat(self.parts, dim=1)  # [1, P]

    def run(self, way: str, pixels: Tensor) -> Run:
        """One prompt with the image `pixels` [1, 3, H, W]."""
        self.loaded.encoder.set_attn_implementation("eager" if way in ("released code", "eager") else "sdpa")
        steps = {"released code": self._released, "hiprune_kernels": self._ours}.get(way, self._stock)
        with _Meter(self.llava) as meter, torch.inference_mode():
            kept, generate_ms = steps(pixels)
        return Run(meter.prompt, kept, meter.encoder_ms, generate_ms, meter.peak_mib)

    def _stock(self, pixels: Tensor) -> tuple[Tensor | None, float]:
        begun = time.perf_counter()
        mask = torch.ones_like(self.input_ids)
        self.llava.generate(
            input_ids=self.input_ids,
            attention_mask=mask,
            pixel_values=pixels,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        return None, (time.perf_counter() - begun) * 1e3

    def _ours(self, pixels: Tensor) -> tuple[Tensor | None, float]:
        with hiprune(self.llava, budget=self.budget, rule=RULE, object_layer=self.loaded.object_layer):
            _, generate_ms = self._stock(pixels)
            return last_selection(self.llava)[0].indices, generate_ms

    def _released(self, pixels: Tensor) -> tuple[Tensor | None, float]:
        begun = time.perf_counter()
        kept, features = self._released_encoder(pixels)
        embed = self.llava.get_input_embeddings()
        before, _, after = self.parts
        prompt = torch.cat([embed(before), features, embed(after)], dim=1)
        mask = torch.ones(prompt.shape[:2], dtype=torch.int64)
        self.llava.generate(inputs_embeds=prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
        return kept, (time.perf_counter() - begun) * 1e3

    def _released_encoder(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        inner, loaded = self.llava.model, self.loaded
        encoded = inner.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        maps = (encoded.attentions[layer - 1] for layer in (loaded.object_layer, loaded.feature_layer))
        scores = [attention[0].mean(dim=0).mean(dim=0)[1:] for attention in maps]  # [N] each; the CLS column is dropped
        kept = _released_selection(scores[0], scores[1], self.budget, loaded.grid)
        return kept, inner.multi_modal_projector(encoded.hidden_states[loaded.feature_layer][:, 1:][:, kept])

    def check(self, runs: dict[str, Run]) -> float:
        """Compare what the language model saw; the largest difference from sdpa's, over the largest embedding.

        Raises:
            RuntimeError: if a way gives other embeddings for the tokens that it kept.
        """
        expected = runs["sdpa"].prompt
        worst = 0.0
        for way, run in runs.items():
            rows = expected
            if run.kept is not None:
                start, count = self.parts[0].shape[1], self.parts[1].shape[1]
                rows = torch.cat([expected[:start], expected[start:][run.kept], expected[start + count :]])
            if run.prompt.shape != rows.shape:
                raise RuntimeError(f"{way}: expected a prompt of {len(rows)} tokens, got {len(run.prompt)}")
            difference = float((run.prompt - rows).abs().max() / rows.abs().max())
            if not difference < 1e-3:
                raise RuntimeError(
                    f"{way}: the kept image features differ from sdpa's by {difference:.1e} of their size"
                )
            worst = max(worst, difference)
        return worst


# ------------------------------------------------------------------------------------------------- float64 and pictures


def _float64_scores(loaded: LoadedEncoder, pixels: Tensor) -> list[Tensor]:
    """Object and deep scores [B, 1 + N], with the whole encoder in float64 and the scores by the reference."""
    exact = copy.deepcopy(loaded.encoder).double()
    exact.set_attn_implementation("sdpa")  # eager attention rounds its softmax to float32
    layers = (loaded.object_layer, loaded.feature_layer)
    with torch.inference_mode():
        heads = queries_and_keys(exact, pixels.double(), layers)
        return [reference.attention_scores(*heads[layer]) for layer in layers]


def _float32_scores(loaded: LoadedEncoder, pixels: Tensor) -> list[Tensor]:
    """The same through the product, in the encoder's own precision."""
    loaded.encoder.set_attn_implementation("sdpa")  # whatever ran last
    layers = (loaded.object_layer, loaded.feature_layer)
    with torch.inference_mode(), record_scores(loaded.encoder, layers=sorted(set(layers))) as scores:
        loaded.encoder(pixels)
    return [scores[layer][0] for layer in layers]


def _exact_selection(scores: list[Tensor], budget: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """Indices [budget] and roles [N] of one image's float64 scores [1, 1 + N], and the gap (see Agreement)."""
    objects, deeps = (x / x.shape[1] for x in scores)  # the released code takes means over the queries
    indices, roles = reference.select_tokens(objects, deeps, budget=budget, grid=grid, rule=RULE, num_prefix_tokens=1)
    objects, deeps, roles = objects[0, 1:], deeps[0, 1:], roles[0]
    cuts = [(objects, roles == 1, roles != 1), (deeps, roles == 3, roles == 0)]
    gaps = [
        float((x[kept].min() - x[passed].max()) / x.max()) for x, kept, passed in cuts if kept.any() and passed.any()
    ]
    return indices[0], roles, min(gaps, default=1.0)


def _photographs(names: Sequence[str]) -> Iterator[tuple[str, Image]]:
    data, pil = optional_import("skimage.data", "demo"), optional_import("PIL.Image")
    return ((name, pil.fromarray(getattr(data, name)())) for name in names)


# ------------------------------------------------------------------------------------------------------------- the run


def run_demo(
    out: Path | str = "out/demo",
    *,
    quick: bool = False,
    model: str | None = None,
    threads: int | None = None,
    command: str = "hiprune demo",
    config: CLIPVisionConfig = CLIP_L_14_336,
) -> dict[str, Any]:
    """Measure, check and draw; write report.md, report.json and one picture per photograph into `out`.

    Args:
        out: directory to write into; made if it is missing.
        quick: one photograph and fewer repetitions.
        model: checkpoint of the vision encoder, see `hiprune_kernels.loading.load_encoder`; None: random weights.
        threads: CPU threads; None leaves PyTorch's choice.
        command: what the reader of the report types to get it.
        config: of the random encoder.

    Returns:
        What report.json holds.

    Raises:
        ImportError: if scikit-image, rich, pillow or matplotlib is missing.
        ValueError: if the checkpoint cannot be used.
        RuntimeError: if a way gives wrong results.

    Example:
        >>> run_demo("out/demo", quick=True)["agreement"][0]["equal"]
        {'released code': 192, 'hiprune_kernels': 192}
    """
    progress = optional_import("rich.progress", "demo")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
    )
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or threads_before)
        with progress.Progress(*columns, transient=True) as bar:
            steps = _Steps(bar)
            steps.begin("a small LLaVA answers", then=3 * len(WAYS) + 2 * len(PHOTOS))
            answers = answer_scenes(out, count=SHOWN if quick else 20)
            steps.begin("a trained encoder", then=3 * len(WAYS) + 2 * len(PHOTOS))
            trained = keep_of_photographs(out, _photographs(PHOTOS[:1] if quick else PHOTOS))
            report = _measure_and_draw(out, steps, quick, model, config)
    finally:
        torch.set_num_threads(threads_before)
    report = {"command": command, "answers": answers, "trained": trained, **report}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (out / "report.md").write_text(_markdown(report))
    return report


class _Steps:
    """Progress of a run whose length becomes known on the way."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._task, self._done = bar, bar.add_task("", total=1), 0

    def begin(self, description: str, *, then: int) -> None:
        """Show what starts now; `then` is the number of steps that follow after it."""
        self._bar.update(self._task, description=description, completed=self._done, total=self._done + 1 + then)
        self._done += 1


def _measure_and_draw(
    out: Path, steps: _Steps, quick: bool, model: str | None, config: CLIPVisionConfig
) -> dict[str, Any]:
    names = PHOTOS[:1] if quick else PHOTOS
    after_rounds = 1 + 2 * len(names)
    steps.begin("building the models", then=3 * len(WAYS) + after_rounds)
    loaded = load_encoder(model, config=config)
    num_tokens = math.prod(loaded.grid)
    budget = resolve_budget(num_tokens, retention=1 / 3)
    ways = _Ways(loaded, budget, seed=0)
    photos = {name: loaded.pixel_values(photo) for name, photo in _photographs(names)}
    runs, difference, timed = _time_ways(ways, photos[names[0]], steps, quick, after_rounds)

    steps.begin("float64 reference", then=2 * len(names))
    exact_of_all = _float64_scores(loaded, torch.cat(list(photos.values())))
    agreement = []
    for i, (name, pixels) in enumerate(photos.items()):
        left = 2 * (len(names) - i)
        exact = [scores[i : i + 1] for scores in exact_of_all]
        indices, roles, gap = _exact_selection(exact, budget, loaded.grid)
        steps.begin(f"{name}: kept tokens", then=left - 1)
        if i > 0:
            runs = {way: ways.run(way, pixels) for way in ("released code", "hiprune_kernels")}
        equal = {way: int(torch.isin(run.kept, indices).sum()) for way, run in runs.items() if run.kept is not None}
        steps.begin(f"{name}: picture", then=left - 2)
        recorded = _float32_scores(loaded, pixels)
        error = max(float((x - y).abs().max() / y.max()) for x, y in zip(recorded, exact))
        draw_overview(
            loaded.seen_image(pixels),
            recorded[0][0, 1:],
            recorded[1][0, 1:],
            roles,
            loaded.grid,
            titles=loaded.overview_titles(loaded.object_layer, budget),
        ).save(out / f"{name}.png")
        agreement.append(Agreement(name, equal, budget, error, gap, f"{name}.png"))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "model": loaded.name,
        "random_weights": loaded.random,
        "remarks": loaded.remarks,
        "tokens": num_tokens,
        "budget": budget,
        "object_layer": loaded.object_layer,
        "feature_layer": loaded.feature_layer,
        "deep_layer": loaded.feature_layer,  # the name that it had before
        "rule": RULE,
        "rounds": len(timed[WAYS[0]]),
        "largest_feature_difference": difference,
        "rows": [dataclasses.asdict(_row(way, timed, num_tokens)) for way in WAYS],
        "agreement": [dataclasses.asdict(line) for line in agreement],
    }


def _time_ways(
    ways: _Ways, pixels: Tensor, steps: _Steps, quick: bool, then: int
) -> tuple[dict[str, Run], float, dict[str, list[Run]]]:
    """One checked run of every way, the largest difference between them, and the timed runs, interleaved."""
    steps.begin("warming up", then=4 * len(WAYS) + then)
    ways.run("sdpa", pixels)
    runs, begun = {}, time.perf_counter()
    for i, way in enumerate(WAYS):
        steps.begin(f"checking {way}", then=4 * len(WAYS) - i - 1 + then)
        runs[way] = ways.run(way, pixels)
    difference = ways.check(runs)
    round_seconds = time.perf_counter() - begun
    timed = {way: [run] if quick else [] for way, run in runs.items()}  # --quick cannot spare the checked round
    rounds = round(QUICK_SECONDS / round_seconds) if quick else max(3, round(SECONDS / round_seconds))
    rounds = min(rounds, 15)
    for i in range(rounds):
        for j in range(len(WAYS)):  # another way goes first in every round, so that none always runs after the same
            way = WAYS[(i + j) % len(WAYS)]
            steps.begin(f"round {i + 1} of {rounds}: {way}", then=(rounds - i) * len(WAYS) - j - 1 + then)
            timed[way].append(ways.run(way, pixels))
    return runs, difference, timed


def _row(way: str, timed: dict[str, list[Run]], num_tokens: int) -> Row:
    runs, slowest = timed[way], timed[WAYS[0]]
    encoder_ms = statistics.median(run.encoder_ms for run in runs)
    peaks = [run.peak_mib for run in runs if run.peak_mib is not None]
    return Row(
        way=way,
        encoder_ms=encoder_ms,
        speedup=statistics.median(run.encoder_ms for run in slowest) / encoder_ms,
        peak_mib=statistics.median(peaks) if peaks else None,
        generate_ms=statistics.median(run.generate_ms for run in runs),
        image_tokens=num_tokens if runs[0].kept is None else len(runs[0].kept),
        prompt_tokens=len(runs[0].prompt),
        encoder_samples_ms=[run.encoder_ms for run in runs],
    )


# ---------------------------------------------------------------------------------------------------------- the report

TABLE_HEAD = ("way", "encoder ms", "speed-up", "peak MiB", "generate ms", "tokens", "prompt")


def table_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the main table as text, in the order of `TABLE_HEAD`."""
    return [
        (
            row["way"],
            f"{row['encoder_ms']:.0f}",
            f"{row['speedup']:.2f}x",
            "n/a" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{row['generate_ms']:.0f}",
            str(row["image_tokens"]),
            str(row["prompt_tokens"]),
        )
        for row in report["rows"]
    ]


def agreement_lines(report: dict[str, Any]) -> list[str]:
    """One sentence per photograph about its kept tokens against the float64 reference's."""
    lines = []
    for line in report["agreement"]:
        counts = ", ".join(f"{way} {count} of {line['kept']}" for way, count in line["equal"].items())
        text = f"{line['photo']}: {counts}; largest score error {line['score_error']:.1e}"
        if min(line["equal"].values()) < line["kept"]:
            text += f", and the closest decision was by {line['gap']:.1e}, so rounding may decide it"
        lines.append(text)
    return lines


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers."""
    found = list(report["remarks"])
    if report["random_weights"]:
        found.append(
            "The weights are random, at the real size: times and memory are those of the real model, but which tokens "
            "are kept means nothing. Query and key projections are scaled so that attention is about as uneven as in "
            "trained models. Give --model for a real checkpoint."
        )
    found.append(
        "The language model is a small random one (4 layers, 512 wide): generate() shows that pruning works end to "
        "end, not how much a 7B model gains."
    )
    slow = (kernel for kernel in report["environment"]["kernels"] if kernel["device"] == "cpu" and kernel["reason"])
    found.extend(f"Not at full speed: {k['operators']} runs in {k['implementation']}, {k['reason']}." for k in slow)
    return found


def print_report(report: dict[str, Any], out: Path | str) -> None:
    """Show the table, the agreement and the notes on the terminal."""
    answers = report["answers"]
    print(f"A trained LLaVA of 1M parameters answers {answers['questions']} questions about {answers['scenes']} scenes")
    aligned(answer_rows(answers))
    print(f"Questions, answers and kept tokens: {Path(out) / answers['picture']}\n")
    print(report["trained"]["note"])
    print(*(f"  {Path(out) / name}" for name in report["trained"]["pictures"].values()), "", sep="\n")
    rows = [TABLE_HEAD, *table_rows(report)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"{report['model']}: {report['budget']} of {report['tokens']} tokens kept\n")
    for first, *numbers in rows:
        print(first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(numbers, widths[1:])), sep="  ")
    print()
    print("Kept tokens that the float64 reference keeps too:")
    print(*(f"  {line}" for line in agreement_lines(report)), sep="\n")
    print(*(f"Note: {note}" for note in notes(report)), sep="\n")
    print(f"Report and pictures: {Path(out) / 'report.md'}")


def _markdown(report: dict[str, Any]) -> str:
    found = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    kernels = "; ".join(f"{k['device']} {k['operators']}: {k['implementation']}" for k in found["kernels"])
    lines = [
        "# hiprune demo",
        "",
        f"`{report['command']}`, {report['date']}",
        "",
        f"- Vision encoder: {report['model']}, float32",
        f"- Machine: {'; '.join(found['devices'])}; {found['platform']}",
        f"- Versions: {versions}",
        f"- Kernels: {kernels}",
        "",
        *(f"- **Note:** {note}" for note in notes(report)),
        "",
        *answers_markdown(report["answers"]),
        *photos_markdown(report["trained"]),
        "## One image through LLaVA-1.5's encoder, and generate() from it",
        "",
        *markdown_table([TABLE_HEAD, *table_rows(report)]),
        "",
        f"Medians of {report['rounds']} interleaved rounds, {NEW_TOKENS} new tokens each. Encoder: vision encoder, "
        "selection and projector; its peak is memory above what the process held before. The speed-up is the released "
        "code's encoder time over this one's. Tokens are the image's, prompt is all that the language model sees.",
        "",
        "*released code* computes every layer's attention matrices with eager attention and selects in PyTorch; "
        "*eager* and *sdpa* are stock and keep every token; *hiprune_kernels* is `apply_hiprune`. All four ran the "
        "same weights and prompt, and the embeddings that reached the language model were compared with "
        f"sdpa's (largest difference {report['largest_feature_difference']:.1e} of the largest value).",
        "",
        "## Kept tokens against the float64 reference",
        "",
        f"{report['budget']} of {report['tokens']} tokens, anchors by layer {report['object_layer']}, registers by "
        f"layer {report['feature_layer']}, the released code's rule. The reference runs the encoder in float64.",
        "",
        *(f"- {line}" for line in agreement_lines(report)),
        "",
        "## Pictures",
        "",
        *(f"![{line['photo']}]({line['picture']})\n" for line in report["agreement"]),
    ]
    return "\n".join(lines)
