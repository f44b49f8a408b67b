"""The files of the small LLaVA's checkpoint: weights, tokenizer, processor, settings of generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from hiprune_kernels.quality.scenes import PATCH, SIDE, WORDS

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, "?", *WORDS))}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ?{% endif %}"
)


def processor() -> LlavaProcessor:
    """Words are split at white space; pictures are brought to 96 x 96 pixels, from -1 to 1."""
    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="isolated")]
    )
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", VOCABULARY["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def save(model: Any, out: Path) -> None:
    """Weights in float16 and all that `from_pretrained` and `AutoProcessor` read."""
    out.mkdir(parents=True, exist_ok=True)
    halved = copy.deepcopy(model).half()
    halved.generation_config = GenerationConfig(
        bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
        pad_token_id=VOCABULARY["<pad>"],
        max_new_tokens=3,
        do_sample=False,
    )
    halved.save_pretrained(out)
    processor().save_pretrained(out)
