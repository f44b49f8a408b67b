"""What pruning saves in a model, part by part, against the same model unpruned, in one run.

Times are those of stock `generate()`, from the prepared inputs on, read where the parts begin and end. Everything takes
turns, so that all meet the same machine. `hiprune bench` is made of this.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from .analysis import encode
from .methods import Method, Picks, Seen, options_of
from .methods.base import merges

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RELEASED = "released code's encoder"
TEXT_TOKENS = 48  # of a prompt beside the image's, where there is no question


# ---------------------------------------------------------------------------------------------------------------- FLOPs


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _sdpa_on_cpu(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


@register_flop_formula(torch.ops.hiprune.attention_with_scores, get_raw=True)
def _attention_with_scores(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    """As attention: the column sums are additions beside two matrix products."""
    return 2 * _product(query, key, *args[:2])


@register_flop_formula(torch.ops.hiprune.attention_scores, get_raw=True)
def _attention_scores(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> int:
    return _product(query, key, *args[:2])


def _product(query: Tensor, key: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None) -> int:
    """Of queries [B, H, M, D] with keys [B, h, N, D], or of packed ones [T, H, D], sequence by sequence."""
    if lengths_q is None:
        batch, heads, rows, width = query.shape
        return 2 * batch * heads * rows * key.shape[2] * width
    counts_k = (lengths_q if lengths_k is None else lengths_k).diff().long()
    pairs = int((lengths_q.diff().long() * counts_k).sum())
    return 2 * pairs * query.shape[1] * query.shape[2]


def prefill_flops(model: Any, inputs: Mapping[str, Any]) -> int:
    """Floating-point operations of a prefill, vision included: two for each product and sum of a matrix product.

    Example:
        >>> with hk.hiprune(model, budget=192):
        ...     prefill_flops(model, inputs)
    """
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return int(counter.get_total_flops())


# --------------------------------------------------------------------------------------------------------------- memory


def memory_kib(name: str) -> int | None:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name + ":")), None)


def reset_peak() -> int | None:
    """Reset the high-water mark and return the memory in use, in KiB; None where that is impossible."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # pages that an earlier run left behind would hide what this one takes
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return memory_kib("VmRSS")


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that `run` takes above what is held before, in MiB; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    before = reset_peak()
    run()
    after = memory_kib("VmHWM")
    return None if before is None or after is None else (after - before) / 1024


# ---------------------------------------------------------------------------------------------------------------- times


@dataclass
class Times:
    """Seconds of each round.

    Attributes:
        encoder: the vision encoder, scores included, and selection where that is inside.
        scores: of that, or of the connector's where attention of text is read, the calls that compute scores. In the
            object layer one kernel gives scores and output, so its attention is in here too.
        selection: the method's own work, wherever it is.
        connector: from the encoder's end to the language model's first layer, without a selection in between.
        prefill: from there to the first token.
        first_token: all of that.
        decode: of each further token; empty where there was one token.
    """

    encoder: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    selection: list[float] = field(default_factory=list)
    connector: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float | None]:
        return {name: statistics.median(values) if values else None for name, values in vars(self).items()}


@dataclass
class Measured:
    """What one way took.

    Attributes:
        prompt_tokens: that the language model saw, all of one prompt.
        cache_mib: of keys and values for them, all prompts.
    """

    times: Times
    prompt_tokens: int
    flops: int
    peak_mib: float | None
    cache_mib: float


class _Clock:
    """Where a run's parts begin and end. In `generate` it is the streamer, which is told of every token."""

    def __init__(self, model: Any, selecting: list[float], scoring: list[float]) -> None:
        from .patch import FAMILIES

        family = FAMILIES[model.config.model_type]
        host = family.host(model)
        self.device, self.selecting, self.scoring = model.device, selecting, scoring
        language_model: Any = family.language_model(host)
        self._encoders, self._layer = family.encoders(host), language_model.layers[0]
        self._before_layer = 0.0
        self._encoded = self._encoder_seconds = self._selected_inside = 0.0
        self.tokens: list[float] = []
        self.prompt_tokens = 0

    def now(self) -> float:
        return _now(self.device)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        with contextlib.ExitStack() as handles:
            for encoder in self._encoders:
                handles.callback(encoder.register_forward_pre_hook(self._begin_encoder).remove)
                handles.callback(encoder.register_forward_hook(self._end_encoder).remove)
            hook = self._layer.register_forward_pre_hook(self._begin_layer, with_kwargs=True)
            handles.callback(hook.remove)
            handles.enter_context(_clocked_scores(self.scoring, self.now))
            yield

    def _begin_encoder(self, module: Any, args: Any) -> None:
        self._begun_encoder = self.now()

    def _end_encoder(self, module: Any, args: Any, output: Any) -> None:
        self._encoded = self.now()
        self._encoder_seconds += self._encoded - self._begun_encoder
        self._selected_inside = sum(self.selecting)

    def _begin_layer(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.tokens:  # the last of these is the prefill; before it, a method may have read the first layers
            self._before_layer = self.now()
            self.prompt_tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]

    def put(self, value: Tensor) -> None:
        if value.ndim == 1:  # the prompt comes first, as [B, L]
            self.tokens.append(self.now())

    def end(self) -> None:
        """`generate` calls this."""

    def add_to(self, times: Times, begun: float) -> None:
        selection = sum(self.selecting)
        times.encoder.append(self._encoder_seconds)
        times.scores.append(sum(self.scoring))
        times.selection.append(selection)
        times.connector.append(self._before_layer - self._encoded - (selection - self._selected_inside))
        times.prefill.append(self.tokens[0] - self._before_layer)
        times.first_token.append(self.tokens[0] - begun)
        if len(self.tokens) > 1:
            times.decode.append((self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1))


@contextlib.contextmanager
def _noted(spent: list[float], now: Callable[[], float]) -> Iterator[None]:
    begun = now()
    yield
    spent.append(now() - begun)


@contextlib.contextmanager
def _clocked_scores(spent: list[float], now: Callable[[], float]) -> Iterator[None]:
    """Note what each call that computes scores takes, in seconds."""
    from .patch import late, tap

    places: tuple[tuple[Any, str], ...] = (
        (tap.Attention, "column_scores"),
        (tap.Attention, "output_and_scores"),
        (late, "text_scores"),
    )
    with contextlib.ExitStack() as undo:
        for place, name in places:
            stock = getattr(place, name)

            def clocked_scores(*args: Any, stock: Any = stock, **kwargs: Any) -> Any:
                with _noted(spent, now):
                    return stock(*args, **kwargs)

            undo.callback(setattr, place, name, stock)
            setattr(place, name, clocked_scores)
        yield


def clocked(method: Method, spent: list[float], now: Callable[[], float]) -> Method:
    """The same method, which notes what its own work takes, in seconds."""
    cls: Any = type(method)

    class Clocked(cls):
        guaranteed = cls.guaranteed

        def select(self, seen: Seen) -> Picks:
            with _noted(spent, now):
                return super().select(seen)

    class ClockedMerging(Clocked):
        def merge(self, features: Tensor, seen: Seen, picks: Picks) -> Tensor:
            with _noted(spent, now):
                return super().merge(features, seen, picks)

    kind: Any = ClockedMerging if merges(method) else Clocked
    kind.__name__ = kind.__qualname__ = cls.__name__
    return kind(**{option: getattr(method, option) for option in options_of(cls)})


@contextlib.contextmanager
def as_released(model: Any) -> Iterator[None]:
    """The vision encoder as the released codes run it: eager attention, and the matrices of all layers are kept."""
    from .patch import FAMILIES
    from .patch.encoders import find_encoder

    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, tuple) and isinstance(output[-1], Tensor):
            kept.append(output[-1])

    family = FAMILIES[model.config.model_type]
    with contextlib.ExitStack() as undo:
        undo.callback(kept.clear)
        for encoder in family.encoders(family.host(model)):
            kind, config, layers = find_encoder(encoder)
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = "eager"
            for layer in layers:
                undo.callback(layer.get_submodule(kind.attention).register_forward_hook(keep).remove)
        yield


def _released_seconds(model: Any, inputs: Mapping[str, Any]) -> float:
    with as_released(model), torch.inference_mode():
        begun = _now(model.device)
        encode(model, inputs)
        return _now(model.device) - begun


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    ways: Mapping[str, Method | None],
    *,
    rounds: int = 5,
    new_tokens: int = 8,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Measured]:
    """Measure `generate()` in several ways, side by side, and the encoder as the released codes run it.

    Every way runs once first, where memory and operations are counted; then all take turns on the clock.

    Args:
        model: a stock vision-language model.
        inputs: of its `generate`, one prompt or several of equal length.
        ways: by name, a method, or None for the model as it is.
        rounds: of all ways.
        new_tokens: that each run generates.
        step: called after every run: (rounds + 1) times the number of ways and one.

    Returns:
        By name; under `RELEASED` the time of the whole vision side (as `encoder`) and its memory, nothing else.

    Raises:
        RuntimeError: if a way's logits are not finite.

    Example:
        >>> found = measure(model, inputs, {"all": None, "192": hk.HiPrune(budget=192)})
        >>> found["192"].times.medians()["first_token"]
    """
    from .patch import applied

    device = model.device
    found: dict[str, Measured] = {}
    for name, method in ways.items():
        with contextlib.nullcontext() if method is None else applied(model, method):
            peak = peak_mib(functools.partial(_check, name, model, inputs), device)
            found[name] = Measured(Times(), 0, prefill_flops(model, inputs), peak, 0.0)
        step()
    peak = peak_mib(functools.partial(_released_seconds, model, inputs), device)
    released = Measured(Times(), 0, 0, peak, 0.0)
    step()
    for _ in range(rounds):
        released.times.encoder.append(_released_seconds(model, inputs))
        step()
        for name, method in ways.items():
            selecting: list[float] = []
            clock = _Clock(model, selecting, [])
            timed = method and clocked(method, selecting, clock.now)
            with contextlib.nullcontext() if timed is None else applied(model, timed), clock.listening():
                begun = clock.now()
                _generate(model, inputs, new_tokens, clock)
            clock.add_to(found[name].times, begun)
            found[name].prompt_tokens = clock.prompt_tokens
            found[name].cache_mib = clock.prompt_tokens * _cache_bytes(model, inputs) / 2**20
            step()
    return {**found, RELEASED: released}


def _prefill(model: Any, inputs: Mapping[str, Any]) -> Any:
    with torch.inference_mode():
        return model(**inputs, use_cache=True, logits_to_keep=1)


def _check(name: str, model: Any, inputs: Mapping[str, Any]) -> None:
    logits = _prefill(model, inputs).logits
    if not bool(logits.isfinite().all()):
        raise RuntimeError(f"{name}: expected finite logits, got {int((~logits.isfinite()).sum())} that are not")


def _generate(model: Any, inputs: Mapping[str, Any], new_tokens: int, clock: _Clock) -> None:
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
        )


def _cache_bytes(model: Any, inputs: Mapping[str, Any]) -> int:
    """Of keys and values of one token in all layers, for every prompt of the batch."""
    text = model.config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    per_layer = 2 * text.num_key_value_heads * width * model.dtype.itemsize
    return per_layer * text.num_hidden_layers * inputs["input_ids"].shape[0]


def with_text(inputs: dict[str, Any], vocabulary: int, batch: int = 1) -> dict[str, Any]:
    """Inputs of an image alone (`processing.vision_inputs` without a tokenizer) with a prompt of so many random words.

    The image stands behind 8 of the 48 words, in every prompt of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    image = inputs["input_ids"].cpu()
    text = torch.randint(3, vocabulary, (1, TEXT_TOKENS), generator=generator)
    ids = torch.cat([text[:, :8], image, text[:, 8:]], dim=1)
    types = torch.zeros_like(ids)
    types[:, 8 : 8 + image.shape[1]] = 1
    device = inputs["input_ids"].device
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    found = {name: value.to(device) for name, value in prompt.items() if name in inputs}
    rest = {name: value for name, value in inputs.items() if name not in found}
    return {name: _repeated(value, batch) for name, value in {**rest, **found}.items()}


def _repeated(value: Any, batch: int) -> Any:
    return value.repeat(batch, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value


class Gain(NamedTuple):
    """What a way of pruning changes until the first token, against all tokens.

    Attributes:
        ratio: of the times to the first token.
        extra: seconds that it takes more in front of the language model: scores and selection, less what they save.
        saved: seconds that it takes less in the language model.
        dropped: how many tokens fewer the language model sees.
    """

    ratio: float
    extra: float
    saved: float
    dropped: int


def without_gain(found: Mapping[str, Gain]) -> list[str]:
    """What to say where pruning does not pay: how much is missing, from where on it would, and what pays."""
    lines = []
    paying = [name for name, gain in found.items() if gain.ratio < 0.98]
    for name, gain in found.items():
        if name in paying:
            continue
        line = f"{name}: pruning does not pay here, the first token takes {gain.ratio:.2f} times as long"
        if gain.extra > gain.saved > 0:
            needed = math.ceil(gain.dropped * gain.extra / gain.saved)
            line += (
                f": {1e3 * gain.extra:.1f} ms more in front of the language model, {1e3 * gain.saved:.1f} ms less in "
                f"it for {gain.dropped} dropped tokens. At that rate it would pay from about {needed} on, as a higher "
                "resolution has them"
            )
        lines.append(line)
    if lines and paying:
        lines.append(f"it pays with {', '.join(paying)}")
    if lines and not paying:
        lines.append("none of these budgets pays: what is saved grows with the image's share of the prompt's tokens")
    return lines
