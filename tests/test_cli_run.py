"""`hiprune run`: the answers are those of `generate`, and the counts those of the prompts that the model saw."""

import re
import sys

import pytest
import torch
from checkpoints import PARTS, TEMPLATE, assemble, photograph, save, save_clip
from cli_helpers import error_of
from PIL import Image
from transformers import AutoModelForImageTextToText

import hiprune_kernels as hk
from hiprune_kernels import cli, processing
from hiprune_kernels.methods import METHODS

FAMILIES = ("llava", "llava_next", "llava_onevision", "video_llava", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl")
QUESTION = "w11 w12 w13"
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def picture(folder):
    return str(photograph(folder / "photo.png"))


@pytest.fixture(scope="module")
def saved(folder):
    """Checkpoints, made when they are first asked for."""

    def path(model_type, **options):
        place = folder / "-".join([model_type, *options])
        return str(place if place.exists() else save(model_type, place, **options))

    return path


def expected_answer(path, model_type, picture, method, text):
    """The text of `generate`'s answer, the prompt's length, and how many of its tokens stand for the image."""
    parts = PARTS[model_type]()
    processor = assemble(parts)
    image = Image.open(picture).convert("RGB")
    inputs = dict(processor(images=[image], text=[text], return_tensors="pt"))
    inputs.pop("num_patches", None)
    model = AutoModelForImageTextToText.from_pretrained(path)
    if method is not None:
        hk.apply_method(model, method)
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    length = inputs["input_ids"].shape[1]
    places = int((inputs["input_ids"] == model.config.image_token_id).sum())
    answer = processor.tokenizer.decode(output[0, length:], skip_special_tokens=True)
    dropped = 0
    if method is not None:
        keep = {name: value for name, value in inputs.items() if name != "attention_mask"}
        with torch.no_grad():
            dropped = length - model(**keep).logits.shape[1]
    return " ".join(answer.split()), length - dropped, places - dropped


def template_text(mark):
    """What the chat template makes of the question."""
    return f"w1 w2 {mark} {QUESTION}  w8 w9"


def figures(text):
    """The rows of the table on stderr: label -> numbers."""
    rows = {}
    for line in text.splitlines():
        found = re.match(r"(\w[\w ]*?)  +(.*)", line)
        if found:
            rows[found[1]] = [float(x) for x in re.findall(r"[0-9.]+", found[2])]
    return rows


# ------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_answer_is_that_of_generate(capsys, saved, picture, model_type):
    path = saved(model_type)
    arguments = ["run", picture, QUESTION, "--model", path, "--retention", "0.3", "--max-new-tokens", str(NEW)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    text = template_text(PARTS[model_type]().mark)
    answer, prompt, places = expected_answer(path, model_type, picture, hk.HiPrune(retention=0.3), text)
    _, whole_prompt, all_places = expected_answer(path, model_type, picture, None, text)
    assert " ".join(printed.out.split()) == answer
    rows = figures(printed.err)
    assert rows["visual tokens"] == [all_places, places, round(places / all_places, 2)]
    assert rows["prompt tokens"] == [whole_prompt, prompt, round(prompt / whole_prompt, 2)]
    assert rows["tokens of the answer"] == [NEW] and rows["seconds to the first token"][0] > 0
    assert rows["tokens a second behind it"][0] > 0


@pytest.mark.parametrize("model_type", FAMILIES)
def test_compare_answers_from_all_tokens_too(capsys, saved, picture, model_type):
    path = saved(model_type)
    arguments = ["run", picture, QUESTION, "--model", path, "--retention", "0.3", "--max-new-tokens", str(NEW)]
    assert cli.main([*arguments, "--compare"]) == 0
    printed = capsys.readouterr()
    text = template_text(PARTS[model_type]().mark)
    method = hk.HiPrune(retention=0.3)
    stock, whole_prompt, all_places = expected_answer(path, model_type, picture, None, text)
    pruned, prompt, places = expected_answer(path, model_type, picture, method, text)
    first, second = printed.out.split("\n\n")
    assert first.splitlines()[0] == f"{all_places} visual tokens, all of them:"
    assert second.splitlines()[0] == "HiPrune, retention 0.3:"
    assert " ".join(first.split(":", 1)[1].split()) == stock
    assert " ".join(second.split(":", 1)[1].split()) == pruned
    rows = figures(printed.err)
    assert rows["visual tokens"][:2] == [all_places, places] and rows["prompt tokens"][:2] == [whole_prompt, prompt]
    for name in ("seconds to the first token", "tokens a second behind it"):
        before, after, ratio = rows[name]
        assert before > 0 and after > 0 and ratio > 0
    assert rows["tokens of the answer"] == [NEW, NEW]


@pytest.mark.parametrize(("model_type", "named"), [("llava", "budget 9"), ("internvl", "budget 9 of each tile")])
def test_what_a_budget_is_of(capsys, saved, picture, model_type, named):
    arguments = ["run", picture, QUESTION, "--model", saved(model_type), "--max-new-tokens", "2", "--compare"]
    assert cli.main([*arguments, "--budget", "9"]) == 0
    printed = capsys.readouterr()
    assert f"\nHiPrune, {named}:\n" in printed.out
    assert figures(printed.err)["visual tokens"][1] == 9 * (7 if model_type == "internvl" else 1)


@pytest.mark.parametrize("name", ["fastervlm", "divprune", "random", "uniform-grid"])
def test_every_method_answers(capsys, saved, picture, name):
    path = saved("llava")
    arguments = ["run", picture, QUESTION, "--model", path, "--method", name, "--budget", "9", "--max-new-tokens", "6"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    method = METHODS[name](budget=9)
    answer, prompt, places = expected_answer(path, "llava", picture, method, template_text("<image>"))
    assert " ".join(printed.out.split()) == answer and places == 9
    assert figures(printed.err)["prompt tokens"][1] == prompt and type(method).__name__ in printed.err


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl", "glm4v", "internvl"])
def test_a_processor_without_a_chat_template(capsys, saved, picture, model_type):
    path = saved(model_type, template=False)
    arguments = ["run", picture, QUESTION, "--model", path, "--retention", "0.3", "--max-new-tokens", str(NEW)]
    assert cli.main(arguments) == 0
    mark = PARTS[model_type]().mark
    text = f"USER: {mark}\n{QUESTION} ASSISTANT:"
    answer, *_ = expected_answer(path, model_type, picture, hk.HiPrune(retention=0.3), text)
    assert " ".join(capsys.readouterr().out.split()) == answer


def test_the_answer_comes_word_by_word(saved, picture, monkeypatch):
    written = []
    monkeypatch.setattr(sys.stdout, "write", written.append)
    arguments = ["run", picture, QUESTION, "--model", saved("llava"), "--budget", "9", "--max-new-tokens", str(NEW)]
    assert cli.main(arguments) == 0
    assert sum(bool(text.strip()) for text in written) >= NEW - 1


def test_one_token_and_another_dtype(capsys, saved, picture):
    """Behind a single token there is no speed; the weights are bfloat16."""
    arguments = ["run", picture, QUESTION, "--model", saved("llava"), "--budget", "9", "--max-new-tokens", "1"]
    assert cli.main([*arguments, "--dtype", "bfloat16"]) == 0
    rows = figures(capsys.readouterr().err)
    assert rows["tokens of the answer"] == [1] and "tokens a second behind it" not in rows


def test_a_budget_that_is_all_there_is(capsys, saved, picture):
    arguments = ["run", picture, QUESTION, "--model", saved("llava"), "--max-new-tokens", str(NEW)]
    assert cli.main([*arguments, "--budget", "36"]) == 0
    assert figures(capsys.readouterr().err)["visual tokens"] == [36, 36, 1]
    assert "budget: expected 1 to 36 (6 x 6 tokens), got 37" in error_of(capsys, *arguments, "--budget", "37")


# -------------------------------------------------------------------------------------------------------------- errors


def test_models_that_cannot_answer(capsys, saved, picture, folder):
    arguments = ["run", picture, QUESTION, "--budget", "9", "--model"]
    message = error_of(capsys, *arguments, saved("vit"))
    assert "model: expected one with a language model, which can answer, got a ViT vision encoder (ViTModel)" in message
    path = saved("llava", processor=False)
    message = error_of(capsys, *arguments, path)
    assert "has no processor with a tokenizer, which a question needs: " in message
    message = error_of(capsys, *arguments, saved("llava"), "--device", "toaster")
    assert "device: 'toaster' cannot be used here" in message
    message = error_of(capsys, *arguments, saved("llava"), "--object-layer", "9")
    assert "object_layer: expected 1 to 4 (1-based" in message


def test_a_template_without_a_place_for_the_image(capsys, picture, tmp_path):
    path = save("llava", tmp_path)
    (path / "chat_template.jinja").write_text("w1 {% for m in messages %}w5{% endfor %}")
    message = error_of(capsys, "run", picture, QUESTION, "--budget", "9", "--model", str(path))
    assert "model: the processor makes no prompt with one image of it: " in message


def test_a_template_that_begins_the_prompt_itself(saved, picture, monkeypatch):
    """The tokenizer must not begin it once more."""
    parts = PARTS["llava"]()
    processor = assemble(parts)
    processor.tokenizer.bos_token = "w1"
    processor.chat_template = TEMPLATE.replace("MARK", parts.mark)
    asked = []
    made = {"input_ids": torch.tensor([[90]]), "num_patches": 3}
    monkeypatch.setattr(type(processor), "__call__", lambda self, **options: asked.append(options) or made)
    model = AutoModelForImageTextToText.from_pretrained(saved("llava"))
    inputs = processing.prompt_inputs(model, processor, Image.open(picture), QUESTION)
    assert list(inputs) == ["input_ids"] and asked[0]["add_special_tokens"] is False
    assert asked[0]["text"][0].startswith("w1 w2 <image>")


# ------------------------------------------------------------------------------------------- methods with a text encoder


@pytest.fixture(scope="module")
def clip(folder, saved):
    """A checkpoint of a CLIP whose vision tower is as wide as the LLaVA's."""
    return str(save_clip(folder / "clip", saved("llava")))


@pytest.mark.parametrize("method", ["trim", "hiprune++", "cdpruner"])
def test_methods_with_a_text_encoder(capsys, saved, picture, clip, method):
    options = ("--method", method, "--retention", "0.3", "--max-new-tokens", "2", "--text-encoder", clip)
    assert cli.main(["run", picture, QUESTION, "--model", saved("llava"), *options]) == 0
    counts = {"trim": int(36 * 0.3) + 1, "hiprune++": 11, "cdpruner": 11}
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("visual tokens"))
    assert line.split()[2:4] == ["36", str(counts[method])]


def test_what_is_no_text_encoder(capsys, saved, picture, clip):
    options = ("--model", saved("llava"), "--budget", "9")
    message = error_of(capsys, "run", picture, QUESTION, *options, "--method", "trim")
    assert "text_encoder: expected a ClipText, as TRIM compares patches with text in CLIP's space" in message
    message = error_of(capsys, "run", picture, QUESTION, *options, "--method", "trim", "--text-encoder", saved("llava"))
    assert "text-encoder: expected a model of type clip, got 'llava'" in message
    message = error_of(capsys, "run", picture, QUESTION, *options, "--method", "ptp", "--text-encoder", clip)
    assert "text-encoder: PTP has no such option; it has budget, retention, alpha" in message
