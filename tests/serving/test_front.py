"""Without an engine: what processors lay out, their hashes, what is refused at start, and positions."""

import doctest
import importlib
import json
import operator
import shutil
from types import SimpleNamespace

import pytest
import torch
from small_models import IMAGE_PAD, PINPOINTS, VISION_END, VISION_START, picture
from transformers import LlavaConfig, PixtralVisionConfig
from vllm import ModelRegistry
from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import llava as stock_llava
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins

from hiprune_kernels.budget import kept_anyres_tokens, resolve_budget
from hiprune_kernels.vllm import ARCHITECTURES, _refuse_what_would_be_ignored, llava, register
from hiprune_kernels.vllm.encoder import check_config, check_rows
from hiprune_kernels.vllm.front import ASKED, PIXELS
from hiprune_kernels.vllm.options import Asked, asked_of_images
from hiprune_kernels.vllm.qwen import placed, text_positions, with_places, without_places

SIZES = [(300, 400), (500, 280), (196, 644), (56, 56), (61, 190)]  # height, width
QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
FAMILIES = {"llava": "<image>", "llava_next": "<image>"}
FAMILIES |= dict.fromkeys(QWENS, VISION_START + IMAGE_PAD + VISION_END)


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_general_plugins()


def processor(folder, hiprune=None, **options):
    overrides = {} if hiprune is None else {"hiprune": hiprune}
    config = ModelConfig(str(folder), dtype="float32", max_model_len=2048, hf_overrides=overrides, **options)
    return MULTIMODAL_REGISTRY.create_processor(config)


def processed(made, family, sizes, request=None):
    data = made.info.parse_mm_data({"image": [picture(0, *size) for size in sizes]})
    kwargs = None if request is None else {"hiprune": request}
    return made(FAMILIES[family] * len(sizes), data, hf_processor_mm_kwargs=kwargs)


def expected_tokens(family, size, data, item, **amount):
    if family == "llava":
        return resolve_budget(576, **amount)
    if family in QWENS:
        return resolve_budget(int(data["mm_kwargs"]["image"][item]["image_grid_thw"].data.prod()) // 4, **amount)
    return kept_anyres_tokens(size, pinpoints=PINPOINTS, tile_size=28, patch_size=4, **amount)


@pytest.mark.parametrize("amount", [{"budget": 60}, {"retention": 0.1}, {"retention": 1.0}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_follow_from_sizes(checkpoint, family, amount):
    data = processed(processor(checkpoint(family), amount), family, SIZES)
    found = [place.length for place in data["mm_placeholders"]["image"]]
    assert found == [expected_tokens(family, size, data, i, **amount) for i, size in enumerate(SIZES)]
    for item, length in zip(data["mm_kwargs"]["image"], found):
        assert Asked.from_row(item[ASKED].data.tolist()) == (
            length,
            Asked(amount.get("budget"), amount.get("retention")),
        )
        assert PIXELS in item and "pixel_values" not in item


@pytest.mark.parametrize(
    "method", ["hired", "divprune", "visionzip", "vispruner", "fastervlm", "random", "uniform-grid"]
)
def test_methods_with_budgets_of_images(checkpoint, method):
    """Counts of every method on tiles are those that it announces, whatever it shares out."""
    made = processor(checkpoint("llava_next"), {"method": method, "retention": 0.3})
    lengths = [place.length for place in processed(made, "llava_next", SIZES)["mm_placeholders"]["image"]]
    assert all(8 < length < 300 for length in lengths)
    assert made.info.most_kept() >= max(lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_ask_for_themselves(checkpoint, family):
    made = processor(checkpoint(family), {"retention": 0.5, "per_request": True})
    default, own = (processed(made, family, SIZES[:2], request) for request in (None, {"budget": 50}))
    assert [p.length for p in own["mm_placeholders"]["image"]] == [
        expected_tokens(family, size, own, i, budget=50) for i, size in enumerate(SIZES[:2])
    ]
    assert not set(own["mm_hashes"]["image"]) & set(default["mm_hashes"]["image"])
    with pytest.raises(ValueError, match="per_request"):
        processed(processor(checkpoint(family), {"retention": 0.5}), family, SIZES[:1], {"budget": 50})


def test_hashes_tell_options_apart(checkpoint):
    folder = checkpoint("llava")
    every = [None, {"budget": 64}, {"budget": 65}, {"retention": 64 / 576}, {"budget": 64, "alpha": 0.2}]
    every += [{"budget": 64, "method": "divprune"}]
    hashes = [processed(processor(folder, own), "llava", SIZES[:1])["mm_hashes"]["image"][0] for own in every]
    assert len(set(hashes)) == len(every)


@pytest.mark.parametrize("family", FAMILIES)
def test_off_is_the_stock_processor(checkpoint, family):
    made = processor(checkpoint(family))
    assert type(made).__module__.startswith("vllm.") and type(made.info).__module__.startswith("vllm.")
    assert PIXELS not in processed(made, family, SIZES[:1])["mm_kwargs"]["image"][0]


BAD = {
    "unknown": ({"budgets": 3}, "budgets: expected an option among"),
    "nothing": ({}, "budget: expected exactly one"),
    "both": ({"budget": 1, "retention": 0.5}, "budget: expected exactly one"),
    "zero": ({"budget": 0}, "budget: expected at least 1"),
    "above": ({"budget": 577}, "budget: expected 1 to 576"),
    "float": ({"budget": 2.5}, "budget: expected an int"),
    "share": ({"retention": 1.5}, "retention: expected a share"),
    "no dict": (192, "expected a dict"),
    "method": ({"budget": 9, "method": "nix"}, "method: expected one of hiprune"),
    "text": ({"budget": 9, "method": "trim"}, "method: expected one that reads images alone"),
    "cdpruner": ({"budget": 9, "method": "cdpruner"}, "method: expected one that reads images alone"),
    "text attention": ({"budget": 9, "method": "fastv"}, "method: expected one that reads images alone"),
    "hiprune++": ({"budget": 9, "method": "hiprune++"}, "method: expected one that reads images alone"),
    "ptp": ({"budget": 9, "method": "ptp"}, "method: expected one that reads images alone"),
    "other's option": ({"budget": 9, "method": "fastervlm", "alpha": 0.1}, "alpha: expected an option among"),
    "rule": ({"budget": 9, "rule": "x"}, "rule: expected one of"),
    "layer": ({"budget": 9, "object_layer": 6}, "object_layer: expected 1 to 5"),
    "per request": ({"budget": 9, "per_request": 1}, "per_request: expected true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_at_start(checkpoint, name):
    hiprune, expected = BAD[name]
    with pytest.raises(RuntimeError, match=f"^hiprune: {expected}"):  # a ValueError vLLM would swallow
        processor(checkpoint("llava"), hiprune)


BAD_QWEN = {
    "official": ({"budget": 9, "rule": "official"}, {}, "rule: expected"),
    "window": ({"budget": 9, "object_layer": 3}, {}, "object_layer: expected a layer without windows, one of 2, 4"),
    "cls": ({"budget": 9, "score_queries": "cls"}, {}, "score_queries: expected"),
    "data": ({"budget": 9}, {"mm_encoder_tp_mode": "data"}, "mm_encoder_tp_mode: expected"),
    "video": ({"budget": 9}, {"video_pruning_rate": 0.5}, "video_pruning_rate: expected none"),
}


@pytest.mark.parametrize("name", BAD_QWEN)
def test_refused_at_start_of_qwen(checkpoint, name):
    hiprune, options, expected = BAD_QWEN[name]
    with pytest.raises(RuntimeError, match=f"^hiprune: {expected}"):
        processor(checkpoint("qwen2_5_vl"), hiprune, **options)


def test_hired_official_is_refused_for_tiles(checkpoint):
    with pytest.raises(RuntimeError, match=r"^hiprune: rule: expected"):
        processor(checkpoint("llava_next"), {"budget": 99, "method": "hired", "rule": "official"})


def test_budgets_that_leave_a_tile_without_a_token_are_refused(checkpoint):
    with pytest.raises(RuntimeError, match=r"^hiprune: budget: expected at least 5, one token for each tile"):
        processor(checkpoint("llava_next"), {"budget": 4})
    made = processor(checkpoint("llava_next"), {"budget": 40, "per_request": True})
    with pytest.raises(ValueError, match=r"budget: expected at least"):
        processed(made, "llava_next", [(300, 300)], {"budget": 4})


def test_videos_are_refused(checkpoint):
    made = processor(checkpoint("qwen2_5_vl"), {"budget": 9})
    assert dict(made.info.get_supported_mm_limits()) == {"image": None, "video": 0}
    with pytest.raises(VLLMValidationError, match=r"At most 0 video\(s\)"):
        made.info.validate_num_items("video", 1)


def test_a_vision_config_that_says_the_models_type(checkpoint, tmp_path):
    """Checkpoints of older releases of transformers have it so, and 5.17 keeps it."""
    folder = shutil.copytree(checkpoint("qwen2_5_vl"), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "qwen2_5_vl"
    (folder / "config.json").write_text(json.dumps(config))
    assert processor(folder, {"budget": 9}).info.options.facts.model_type == "qwen2_5_vl_vision"


def test_positions_beyond_the_table_are_refused(checkpoint):
    """The tables of these checkpoints hold 4 * 4096 positions, and a wide image brings many, however few tokens stay."""
    made = processor(checkpoint("qwen2_5_vl"), {"budget": 1}, limit_mm_per_prompt={"image": 900})
    wide = (28, 28 * 200)
    assert len(processed(made, "qwen2_5_vl", [wide] * 72)["mm_placeholders"]["image"]) == 72
    with pytest.raises(ValueError, match=r"images: expected at most 14336 positions more than tokens, got 14527"):
        processed(made, "qwen2_5_vl", [wide] * 73)


def test_other_architectures_are_refused(checkpoint, monkeypatch):
    """Options that no class of ours would see must not be ignored."""
    monkeypatch.delitem(ARCHITECTURES, "LlavaForConditionalGeneration")
    with pytest.raises(RuntimeError, match=r"^hiprune: expected a model of .*, got LlavaForConditionalGeneration"):
        processor(checkpoint("llava"), {"budget": 9})
    assert processor(checkpoint("llava")) is not None


def test_other_towers_are_refused(checkpoint):
    with pytest.raises(RuntimeError, match=r"^hiprune: (vision_config|vision_feature_layer): expected"):
        config = ModelConfig(
            str(checkpoint("llava")),
            dtype="float32",
            hf_overrides={"hiprune": {"budget": 9}, "vision_feature_layer": [1, 2]},
        )
        MULTIMODAL_REGISTRY.create_processor(config)


def test_pixtral_is_served_by_stock_code_alone():
    """vLLM's class for LLaVA-1.5 serves it too."""
    config = LlavaConfig(vision_config=PixtralVisionConfig())
    context = SimpleNamespace(get_hf_config=lambda *kind: config)
    assert type(llava.build_info(context)) is stock_llava.PixtralHFProcessingInfo
    config.hiprune = {"budget": 9}
    with pytest.raises(
        RuntimeError, match=r"^hiprune: vision_config: expected a tower of type clip_vision_model, got p"
    ):
        llava.build_info(context)


def test_register_again_changes_nothing():
    before = dict(ModelRegistry.models)
    register()
    assert dict(ModelRegistry.models) == before


def test_unknown_releases_are_refused():
    registry = SimpleNamespace(inspect_model_cls=lambda architectures, config: (None, architectures[0]))
    _refuse_what_would_be_ignored(registry, "0.99.0")
    config = SimpleNamespace(hf_config=SimpleNamespace(hiprune={"budget": 9}))
    with pytest.raises(RuntimeError, match=r"^hiprune: expected vLLM 0.32, got 0.99.0"):
        registry.inspect_model_cls(["LlavaForConditionalGeneration"], config)
    off = SimpleNamespace(hf_config=SimpleNamespace())
    assert registry.inspect_model_cls(["Any"], off) == (None, "Any")


CONFIGS = {
    "video_pruning_rate": ("model_config.multimodal_config", 0.3),
    "enable_tower_connector_lora": ("lora_config", True),
    "compile_mm_encoder": ("compilation_config", True),
    "cudagraph_mm_encoder": ("compilation_config", True),
}


@pytest.mark.parametrize("name", [None, *CONFIGS])
def test_what_pruning_cannot_go_with(name):
    config = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=SimpleNamespace(video_pruning_rate=None)),
        lora_config=SimpleNamespace(enable_tower_connector_lora=False),
        compilation_config=SimpleNamespace(compile_mm_encoder=False, cudagraph_mm_encoder=False),
    )
    if name is None:
        check_config(config)
        return
    where, value = CONFIGS[name]
    setattr(operator.attrgetter(where)(config), name, value)
    with pytest.raises(RuntimeError, match=f"^hiprune: {name}: expected"):
        check_config(config)


def test_rows_that_are_not_as_many_as_placeholders():
    asked = torch.tensor([Asked(5, None).to_row(5), Asked(None, 0.5).to_row(7)])
    check_rows([torch.zeros(5, 2), torch.zeros(7, 2)], asked)
    with pytest.raises(RuntimeError, match=r"expected \[5, 7\] rows of images, .* got \[5, 8\]"):
        check_rows([torch.zeros(5, 2), torch.zeros(8, 2)], asked)


def test_images_that_ask_for_the_same_go_together():
    rows = [Asked(5, None), Asked(None, 1 / 3), Asked(5, None), Asked(6, None)]
    groups = asked_of_images(torch.tensor([row.to_row(5) for row in rows]))
    assert groups == {rows[0]: [0, 2], rows[1]: [1], rows[3]: [3]}


# ------------------------------------------------------------------------------------------------------------ positions

IMAGE, START = 7, 5


def prompt(grids, kept):
    """Ids of a prompt with images between words, and their placeholders."""
    ids, spans = [1, 2], []
    for (height, width), tokens in zip(grids, kept):
        ids.append(START)
        spans.append((len(ids), len(tokens), max(height, width)))
        ids += [IMAGE] * len(tokens) + [3, 4]
    return ids, spans


def true_positions(grids, kept):
    """Those of transformers for the whole prompt, of which the kept tokens are taken."""
    columns, position = [(0, 0, 0), (1, 1, 1)], 2
    for (height, width), tokens in zip(grids, kept):
        columns.append((position,) * 3)
        position += 1
        columns += [(position, position + t // width, position + t % width) for t in tokens]
        position += max(height, width)
        columns += [(position + i,) * 3 for i in range(2)]
        position += 2
    return torch.tensor(columns).T, position


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_positions_of_any_chunks(dtype):
    """Portrait, wide, and beyond what bfloat16 counts; a chunk may begin and end anywhere."""
    grids = [(30, 4), (2, 700), (9, 9)]
    kept = [[0, 5, 77, 119], [1, 300, 699, 700, 1399], list(range(81))]
    ids, spans = prompt(grids, kept)
    expected, after = true_positions(grids, kept)
    start, delta = text_positions(len(ids), spans)
    assert len(ids) + delta == after
    rows = [with_places(torch.ones(len(k), 3, dtype=dtype), torch.tensor(k), g[1]) for k, g in zip(kept, grids)]
    for computed in range(len(ids)):
        for end in {computed + 1, min(computed + 5, len(ids)), len(ids)}:
            parts = []
            for (first, count, _), own in zip(spans, rows):
                part = own[max(0, computed - first) : max(0, min(count, end - first))]
                parts += [part] if len(part) else []
            states, places = without_places(parts)
            assert all(state.shape[1] == 3 for state in states)
            found = placed(torch.tensor(ids), places, start, computed, IMAGE, START)
            assert torch.equal(found[:, computed:end], expected[:, computed:end])
            assert torch.equal(found[:, end:], start[:, end:])


def test_a_prompt_that_ends_with_an_image():
    positions, delta = text_positions(4, [(1, 3, 10)])
    assert 4 + delta == 11 == int(positions[:, -1].max()) + 1


@pytest.mark.parametrize("name", ["options", "qwen"])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"hiprune_kernels.vllm.{name}"))
    assert result.attempted and not result.failed
