"""Models as users get them: checkpoints from disk in every form, and inputs from transformers' own processors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import qwen_reference
import torch
from checkpoints import PARTS, assemble, qwen_parts
from models import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    VLM_CASES,
    tiny_llava,
    tiny_llava_next,
    tiny_onevision,
    tiny_qwen,
)
from patch_reference import one_thread, row_logits, stock_generate  # noqa: F401
from PIL import Image
from safetensors.torch import load_file

from hiprune_kernels.patch import apply_hiprune, is_patched, last_selection, remove_hiprune

SPECIAL = [0, IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END]
GREEDY = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": SPECIAL}


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def answer(model, inputs):
    return model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module", params=["llava", "llava_next", "qwen2_5_vl"])
def case(request):
    """A stock model and inputs with images for it."""
    return VLM_CASES[request.param]()


def same_weights(stock, dtype):
    """A model of the stock model's weights in another dtype, made without any file."""
    model = type(stock)._from_config(copy.deepcopy(stock.config), dtype=dtype).eval()
    model.load_state_dict(stock.state_dict())
    return model


def test_a_patched_model_saves_the_stock_files(case, tmp_path):
    stock, _ = case
    stock.save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    apply_hiprune(copy.deepcopy(stock), retention=0.3).save_pretrained(tmp_path / "patched", max_shard_size="100KB")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 2 and "model.safetensors.index.json" in names
    for name in names:
        files = (tmp_path / "stock" / name, tmp_path / "patched" / name)
        if name.endswith(".json"):
            assert files[0].read_text() == files[1].read_text()
            continue
        stock_weights, weights = (load_file(file) for file in files)
        assert stock_weights.keys() == weights.keys()
        assert all(torch.equal(weights[key], value) for key, value in stock_weights.items())


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # they match a parameter
@pytest.mark.parametrize(
    ("saved", "options", "dtype"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float32, {"dtype": torch.bfloat16}, torch.bfloat16),
        (torch.float32, {"dtype": "float16"}, torch.float16),
        (torch.bfloat16, {"dtype": "auto"}, torch.bfloat16),
        (torch.bfloat16, {"dtype": torch.float32}, torch.float32),
        (torch.float32, {"device_map": "cpu"}, torch.float32),
        (torch.float32, {"device_map": "disk"}, torch.float32),
        (torch.float32, {"attn_implementation": "eager"}, torch.float32),
    ],
    ids=str,
)
def test_loading_then_patching(case, saved, options, dtype, tmp_path):
    """From shards in a sub-folder, which a patched model wrote."""
    stock, inputs = case
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    written = apply_hiprune(same_weights(stock, saved), retention=0.5)
    written.save_pretrained(tmp_path / "part", max_shard_size="100KB")
    expected = same_weights(remove_hiprune(written), dtype)
    if options.get("device_map") == "disk":  # weights that accelerate's hooks bring in when they are needed
        inside = [*stock.model.named_children(), *stock.model.named_parameters(recurse=False)]
        places = {f"model.{name}": "disk" if "language" in name else "cpu" for name, _ in inside} | {"lm_head": "cpu"}
        options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    loaded = type(stock).from_pretrained(tmp_path, subfolder="part", **options)
    expected.set_attn_implementation(options.get("attn_implementation", "sdpa"))
    assert loaded.dtype == dtype and not is_patched(loaded) and not loaded.training
    assert torch.equal(run(loaded, inputs), run(expected, inputs))
    dense = answer(loaded, inputs)
    for model in (loaded, expected):
        apply_hiprune(model, retention=0.3)
    assert torch.equal(run(loaded, inputs), run(expected, inputs))
    assert torch.equal(answer(loaded, inputs), answer(expected, inputs))
    kept = [(selection.indices.tolist(), selection.grid) for selection in last_selection(loaded)]
    assert kept == [(selection.indices.tolist(), selection.grid) for selection in last_selection(expected)]
    assert torch.equal(answer(remove_hiprune(loaded), inputs), dense)


# --------------------------------------------------------------------------------------------------------- processors


# model, and the parts of its processor
PROCESSORS = {
    "llava": (tiny_llava, PARTS["llava"]),
    "next": (tiny_llava_next, PARTS["llava_next"]),
    "onevision": (tiny_onevision, PARTS["llava_onevision"]),
    "qwen2": (lambda: tiny_qwen("qwen2"), lambda: qwen_parts("Qwen2VL", 40)),
    "qwen2.5": (lambda: tiny_qwen("qwen2.5"), lambda: qwen_parts("Qwen2_5_VL", 40)),
    "qwen3": (lambda: tiny_qwen("qwen3"), lambda: qwen_parts("Qwen3VL", 40)),
}
SIZES = ((70, 40), (40, 100))  # (width, height) of the pictures
# token grids after resizing; of tiles with the view of the whole
GRIDS = {
    "llava": [(6, 6), (6, 6)],
    "next": [(3, 6, 6), (10, 6, 6)],
    "onevision": [(3, 5, 5), (10, 5, 5)],
    "qwen": [(3, 6), (7, 3)],
}


def photo(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(width).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def kept_placeholders(model, inputs, selections):
    """Which of all images' placeholders stay, bool, by the stock packing of tiles (newlines stay)."""
    kept = [(selection.roles > 0).float() for selection in selections]
    if "image_sizes" in inputs:
        tiles = [flags.view(selection.grid[0], -1, 1) for flags, selection in zip(kept, selections)]
        onevision = model.config.model_type == "llava_onevision"
        options = {"vision_aspect_ratio": model.config.vision_aspect_ratio} if onevision else {}
        if not onevision:
            options = {"vision_feature_select_strategy": "default"}
        kept, _ = model.model.pack_image_features(tiles, inputs["image_sizes"], image_newline=torch.ones(1), **options)
    return torch.cat([flags.flatten() for flags in kept]) > 0


def rows_by_hand(model, inputs, selections):
    """Embeddings [L', C] of each row, with the stock features of the placeholders that stay."""
    images = {name: inputs[name] for name in inputs if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(**images, return_dict=True).pooler_output))
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    places, keep = inputs["input_ids"] == IMAGE_TOKEN, inputs["attention_mask"].bool()
    embeds[places] = features
    keep[places] = kept_placeholders(model, inputs, selections)
    return [embeds[i, columns] for i, columns in enumerate(keep)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_output_as_it_is(name):
    """Photographs and text in, through the whole processor; out come the tokens of explicitly pruned prompts."""
    build, make_parts = PROCESSORS[name]
    stock, parts = build(), make_parts()
    texts = [f"w5 w6 {parts.mark} w7 w8 w9", f"w4 {parts.mark} w11"]
    pictures = [photo(*size) for size in SIZES]
    inputs = assemble(parts)(images=pictures, text=texts, return_tensors="pt", padding=True)
    model = apply_hiprune(copy.deepcopy(stock), retention=0.4)
    logits, tokens = run(model, inputs)[:, -1], answer(model, inputs)
    selections = last_selection(model)
    assert [selection.grid for selection in selections] == GRIDS[name if name in GRIDS else "qwen"]
    assert all(0.2 < len(s.indices) / len(s.roles) < 0.5 for s in selections)
    if name.startswith("qwen"):
        chosen = {IMAGE_TOKEN: [(selection.indices, selection.roles) for selection in selections]}
        rows = qwen_reference.pruned_rows(stock, inputs, chosen)
        expected = torch.stack([qwen_reference.row_logits(stock, row)[-1] for row in rows])
        assert torch.equal(tokens, qwen_reference.greedy(stock, rows, 4, SPECIAL))
    else:
        rows = rows_by_hand(stock, inputs, selections)
        expected = torch.stack([row_logits(stock, row)[-1] for row in rows])
        assert torch.equal(tokens, stock_generate(stock, [(row, None) for row in rows], **GREEDY))
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert float((logits - run(stock, inputs)[:, -1]).abs().max()) > 1e-2  # pruning is visible
