"""Whether pruning harms answers, without a download: a small LLaVA that reads generated scenes, and what it gets right.

The model is a stock `LlavaForConditionalGeneration` of 1.04M parameters, trained by bench/quality/train.py, in files as
on the hub. Its pictures show coloured handwritten digits; nine kinds of questions are asked. What it shows: whether
kept tokens are the right ones, arrive where they should, and suffice to answer. What it does not: how methods rank on
photographs, or with large models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..methods import Method
from ..visualize import optional_import
from .scenes import QUESTIONS, Scene, scene

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOGETHER = 20  # scenes in a call of `generate`


def checkpoint() -> str:
    """The folder of the shipped model, for `from_pretrained`; the command line knows it as `--model digits`.

    Example:
        >>> from transformers import AutoModelForImageTextToText
        >>> AutoModelForImageTextToText.from_pretrained(checkpoint()).config.image_seq_length
        144
    """
    return str(Path(__file__).parent / "digits_llava")


class Answers(NamedTuple):
    """What a model answered about scenes.

    Attributes:
        words: [S][9], an answer to each question of each scene.
        right: [S, 9] bool.
        share_on_digits: [S], of the kept tokens those on digits; None where nothing was dropped.
        kept: [S], indices of the kept tokens; None where nothing was dropped.
    """

    words: list[list[str]]
    right: np.ndarray
    share_on_digits: np.ndarray | None = None
    kept: list[torch.Tensor] | None = None

    @property
    def accuracy(self) -> tuple[float, float]:
        """The share of right answers, and its standard error; questions about one scene are not independent."""
        scenes = self.right.mean(axis=1)
        return float(scenes.mean()), float(scenes.std(ddof=1) / len(scenes) ** 0.5)


def load() -> tuple[PreTrainedModel, Any]:
    """The shipped model in float32, in evaluation mode, and its processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..processing import quiet_transformers

    with quiet_transformers():
        model = AutoModelForImageTextToText.from_pretrained(checkpoint(), dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(checkpoint())
    return model.eval().requires_grad_(False), processor


def scenes_of(count: int, seed: int = 0) -> list[Scene]:
    """Scenes with digits that the model has never seen.

    Raises:
        ValueError, TypeError: if there are fewer than two.
    """
    if count < 2:
        raise ValueError(f"scenes: expected at least 2, got {count}")
    return [scene(seed * 100_000 + i) for i in range(count)]


def ask(
    model: PreTrainedModel,
    processor: Any,
    scenes: Sequence[Scene],
    method: Method | None = None,
    step: Callable[[], None] = lambda: None,
) -> Answers:
    """Ask all questions about each scene, through stock `generate()`, greedily.

    Args:
        model: as of `load`, not patched.
        processor: its processor.
        scenes: to ask about.
        method: that prunes meanwhile; None asks the model as it is.
        step: called once a scene.

    Example:
        >>> model, processor = load()
        >>> ask(model, processor, scenes_of(2), hk.HiPrune(budget=48)).right.shape
        (2, 9)
    """
    from ..patch import apply_method, last_selection, remove_method

    image_of = optional_import("PIL.Image").fromarray
    if method is not None:
        apply_method(model, method)
    words, right, kept = [], [], []
    try:
        for first in range(0, len(scenes), _TOGETHER):
            part = scenes[first : first + _TOGETHER]
            pairs = [own.questions(np.random.default_rng(first + i)) for i, own in enumerate(part)]
            questions = [question for own in pairs for question, _ in own]
            images = [image_of(own.pixels) for own in part for _ in QUESTIONS]
            found = _generated(model, processor, images, questions)
            for i, own in enumerate(pairs):
                words.append(found[i * len(QUESTIONS) : (i + 1) * len(QUESTIONS)])
                right.append([word == answer for word, (_, answer) in zip(words[-1], own)])
            if method is not None:
                kept += [selection.indices for selection in last_selection(model)][:: len(QUESTIONS)]
            for _ in part:
                step()
    finally:
        if method is not None:
            remove_method(model)
    if method is None:
        return Answers(words, np.array(right))
    on_digits = [float((own.owners.ravel() >= 0)[indices.numpy()].mean()) for own, indices in zip(scenes, kept)]
    return Answers(words, np.array(right), np.array(on_digits), kept)


def _generated(model: Any, processor: Any, images: list[Any], questions: list[str]) -> list[str]:
    from ..processing import quiet_transformers

    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}] for question in questions
    ]
    texts = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode(), quiet_transformers():
        sequences = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=3)
    new = sequences[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def compare(
    methods: Mapping[str, Callable[[int], Method]],
    budgets: Sequence[int],
    scenes: Sequence[Scene],
    step: Callable[[], None] = lambda: None,
) -> dict[str, dict[int, Answers]]:
    """Answers of the shipped model for each method and budget; under "" and the number of all tokens, unpruned.

    Args:
        methods: by name, from a budget to a method with it.
        budgets: tokens that stay.
        scenes: to ask about.
        step: as of `ask`.
    """
    model, processor = load()
    found = {"": {len(scenes[0].owners.ravel()): ask(model, processor, scenes, step=step)}}
    for name, method in methods.items():
        found[name] = {budget: ask(model, processor, scenes, method(budget), step) for budget in budgets}
    return found
