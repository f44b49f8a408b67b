"""The text side of methods that are guided by it: the language model's embeddings, or a CLIP text tower's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..facts import EncoderFacts
from .base import Seen

_POSITIONS = 77  # of CLIP's text tower


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipText:
    """The CLIP text tower that belongs to a model's vision tower, for methods that compare patches with text.

    CLIP's patches are *less* like the text the more they show of what it names, so methods turn the sign of its
    similarities round (`sign`).

    Attributes:
        clip: a `transformers.CLIPModel` whose vision tower is the one in the pruned model.
        clip_tokenizer: CLIP's tokenizer.
        tokenizer: the pruned model's tokenizer, which brings its prompts back to text.
        instruction: from the text of a prompt to what is asked in it, without the template.

    Example:
        >>> text = ClipText(clip=clip_model, clip_tokenizer=clip_tokenizer, tokenizer=processor.tokenizer)
        >>> apply_method(model, CDPruner(budget=64, text_encoder=text))
    """

    clip: Any
    clip_tokenizer: Callable[..., Any]
    tokenizer: Any
    instruction: Callable[[str], str] = str.strip

    sign = -1

    def __post_init__(self) -> None:
        parts = ("text_model", "text_projection", "vision_model", "visual_projection")
        if not all(hasattr(self.clip, part) for part in parts):
            raise TypeError(f"clip: expected a transformers.CLIPModel, got {type(self.clip).__name__}")
        for name in ("clip_tokenizer", "instruction"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name}: expected a callable, got {type(getattr(self, name)).__name__}")
        if not hasattr(self.tokenizer, "decode"):
            raise TypeError(f"tokenizer: expected a tokenizer with `decode`, got {type(self.tokenizer).__name__}")

    def embeddings(self, ids: Tensor, *, truncated: bool = False) -> Tensor:
        """Text of a prompt [M] as embeddings of segments of 77 tokens, [S, D]; the last is padded with id 0.

        `truncated`: of the first 77 alone, [1, D], of which the last is then the end of the text.
        """
        text = self.instruction(self.tokenizer.decode(ids, skip_special_tokens=True))
        tokens = torch.as_tensor(self.clip_tokenizer(text)["input_ids"])
        if truncated and len(tokens) > _POSITIONS:
            tokens = torch.cat([tokens[: _POSITIONS - 1], tokens[-1:]])
        tokens = F.pad(tokens, (0, -len(tokens) % _POSITIONS)).view(-1, _POSITIONS).to(self._device)
        with torch.no_grad():
            pooled = self.clip.text_model(input_ids=tokens).pooler_output
            return self.clip.text_projection(pooled).float()

    def patches(self, rows: Tensor) -> Tensor:
        """An encoder's finished rows [T, C] in the space of the embeddings, [T, D].

        Raises:
            ValueError: if the rows are not as wide as those of the tower.
        """
        norm = self.clip.vision_model.post_layernorm
        if rows.shape[-1] != norm.weight.shape[0]:
            expected, got = norm.weight.shape[0], rows.shape[-1]
            raise ValueError(f"text_encoder: expected a CLIP whose vision tower is {got} wide, got one of {expected}")
        with torch.no_grad():
            return self.clip.visual_projection(norm(rows.to(norm.weight))).float().to(rows.device)

    @property
    def _device(self) -> torch.device:
        return self.clip.text_projection.weight.device


def check_text_encoder(text_encoder: Any) -> None:
    """Raise TypeError if this is no text encoder."""
    wanted = ("embeddings", "patches", "sign")
    if text_encoder is not None and not all(hasattr(text_encoder, name) for name in wanted):
        raise TypeError(f"text_encoder: expected a ClipText, got {type(text_encoder).__name__}")


def check_tower(text_encoder: Any, encoder: EncoderFacts) -> None:
    """Raise ValueError if CLIP's text is to be compared with patches that are none of CLIP's."""
    if isinstance(text_encoder, ClipText) and encoder.model_type != "clip_vision_model":
        raise ValueError(f"text_encoder: expected a model with CLIP's vision tower for a ClipText, got {encoder.name}")


def relevance(
    seen: Seen,
    image: int,
    tokens: slice,
    text_encoder: ClipText | None,
    reduce: Callable[[Tensor, Tensor], Tensor],
    **options: bool,
) -> Tensor | None:
    """How relevant an image's tokens are to its prompt, [T']; None where the prompt has no text.

    `reduce` makes it from the tokens' vectors [T', D] and those of the text [S, D]: with a text encoder those of its
    segments, and the sign is turned; else those of the text's tokens, in the language model's space. `options` are
    the text encoder's.
    """
    if text_encoder is None:
        text = seen.text[image].float()
        return reduce(seen.features[tokens].float(), text) if len(text) else None
    if seen.text_ids is None:
        raise ValueError("text_encoder: expected prompts as input_ids, got embeddings, which do not say what is asked")
    ids = seen.text_ids[image]
    if len(ids) == 0:
        return None
    rows = seen.features if seen.encoder_features is None else seen.encoder_features
    embeddings = text_encoder.embeddings(ids, **options).to(rows.device)
    return text_encoder.sign * reduce(text_encoder.patches(rows[tokens]), embeddings)


def mean_of_cosines(tokens: Tensor, text: Tensor) -> Tensor:
    """The mean over rows of text of a token's cosine with them."""
    return (F.normalize(tokens, dim=-1) @ F.normalize(text, dim=-1).T).mean(dim=1)


def cosine_with_mean(tokens: Tensor, text: Tensor) -> Tensor:
    """A token's cosine with the mean of the text."""
    return F.cosine_similarity(tokens, text.mean(dim=0)[None], dim=-1)


def notes_of(texts: Sequence[Tensor | None], what: str) -> list[str]:
    """Of each image what to say where it had no text."""
    return [f"no text in the prompt: {what}" * (text is None) for text in texts]
