"""lmms-eval's evaluator on the small trained LLaVA, pruned, against a loop of our own."""

import functools
import json
import math

import checkpoints
import digits_task
import pytest
import torch
from lmms_eval import evaluator, models
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager
from PIL import Image
from transformers import AutoModelForImageTextToText

import hiprune_kernels as hk
from hiprune_kernels import cli_eval
from hiprune_kernels.cli import main
from hiprune_kernels.evaluation.models import STOCK, GenerationError, model_class
from hiprune_kernels.methods import Random
from hiprune_kernels.quality import checkpoint, load

SCENES = 2  # nine questions each
ON_CPU = {"device": "cpu", "device_map": "cpu"}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    return folder, digits_task.write_task(folder, scenes=SCENES)


@pytest.fixture(scope="module")
def lmms():
    model = model_class("llava_hf")(pretrained=checkpoint(), **ON_CPU)
    model.stays_loaded = True
    return model


@functools.lru_cache
def manager(folder):
    return TaskManager("WARNING", include_path=str(folder))


def evaluate(model, folder, **options):
    return evaluator.simple_evaluate(
        model=model,
        tasks=["digits"],
        task_manager=manager(folder),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )


def answers(results):
    return [sample["resps"][0][0] for sample in sorted(results["samples"]["digits"], key=lambda each: each["doc_id"])]


def own_answers(docs, method):
    """One question at a time, through `apply_method` and stock `generate()`."""
    model, processor = load()
    if method is not None:
        hk.apply_method(model, method)
    found = []
    for doc in docs:
        content = [{"type": "image"}, {"type": "text", "text": doc["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(doc["image"]) as image:
            inputs = processor(images=image, text=text, return_tensors="pt")  # a second <s>, as lmms-eval has it
        with torch.inference_mode():
            sequence = model.generate(**inputs, do_sample=False, max_new_tokens=3)[0]
        found.append(processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def accuracy(found, docs):
    return sum(answer.strip() == doc["answer"] for answer, doc in zip(found, docs)) / len(docs)


def test_the_command_reports_what_a_loop_of_our_own_finds(task, tmp_path, capsys):
    folder, docs = task
    command = ["eval", "--model", "digits", "--tasks", "digits", "--include-path", str(folder), "--budgets", "8,24"]
    assert main([*command, "--methods", "hiprune,random:seed=3", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "eval.json").read_text())
    found = [(row["method"], row["budget"], row["figures"]["digits"]) for row in printed["results"]]
    methods = [hk.HiPrune(budget=24), Random(budget=24, seed=3), hk.HiPrune(budget=8), Random(budget=8, seed=3)]
    expected = [accuracy(own_answers(docs, method), docs) for method in (None, *methods)]
    labels = [(None, None), ("hiprune", 24), ("random:seed=3", 24), ("hiprune", 8), ("random:seed=3", 8)]
    assert found == [(*label, figure) for label, figure in zip(labels, expected)]
    assert expected[0] == 1 > min(expected[1:])  # or wrong budgets would go unnoticed
    assert all(
        row["lmms_eval"]["results"]["digits"]["right,none"] == row["figures"]["digits"] for row in printed["results"]
    )


def test_lmms_eval_finds_the_models_by_their_entry_point(task):
    for name, stock in STOCK.items():
        cls = models.get_model(f"hiprune_{name}")
        assert cls is model_class(name) and cls.__mro__[1] is models.get_model(name)
        assert not cls.is_simple and cls.__name__ == stock.class_name
    folder, docs = task
    options = f"pretrained={checkpoint()},device_map=cpu,method=hiprune,budget=8,alpha=0.3,keep_roles=anchor+register"
    found = answers(evaluate("hiprune_llava_hf", folder, model_args=options, device="cpu"))
    method = hk.HiPrune(budget=8, alpha=0.3, keep_roles=("anchor", "register"))
    assert found == own_answers(docs, method)
    assert found != own_answers(docs, hk.HiPrune(budget=8))


def test_an_error_ends_the_run(task, lmms, monkeypatch):
    """Of lmms-eval's own class it makes an empty answer, which is then counted as wrong."""
    folder, _ = task

    def broken(*args, **kwargs):
        raise ValueError("out of tokens")

    with monkeypatch.context() as patch:
        patch.setattr(lmms.model, "generate", broken)
        with pytest.raises(GenerationError, match="generate: ValueError: out of tokens"):
            evaluate(lmms, folder, limit=2)
        assert lmms.model.generate is broken
    stock = models.get_model("llava_hf")(pretrained=checkpoint(), **ON_CPU)
    monkeypatch.setattr(stock.model, "generate", broken)
    assert answers(evaluate(stock, folder, limit=2)) == ["", ""]


def test_an_error_while_words_are_made_ends_the_run_too(task, lmms, monkeypatch):
    folder, _ = task
    monkeypatch.setattr(type(lmms.tokenizer), "batch_decode", lambda *args, **kwargs: [][0])
    with pytest.raises(GenerationError, match="lmms-eval: Error list index out of range in generating"):
        evaluate(lmms, folder, limit=1)


def test_pruning_comes_and_goes(task, lmms):
    folder, docs = task
    few = hk.HiPrune(budget=4)
    for method in (few, None, few):
        lmms.prune(method)
        assert hk.is_patched(lmms.model) == (method is not None)
        assert "generate" not in lmms.model.__dict__
        assert answers(evaluate(lmms, folder)) == own_answers(docs, method)
    request = Instance(
        "loglikelihood", {}, 0, {"task": "digits", "doc_id": 0, "repeats": 1}, ("", "", None, 0, "digits", "test")
    )
    with pytest.raises(ValueError, match="output_type generate_until"):
        lmms.loglikelihood([request])
    lmms.prune(None)


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_each_family_generates_what_apply_hiprune_does(task, tmp_path, model_type):
    folder, _ = task
    (name,) = (name for name, stock in STOCK.items() if model_type in stock.model_types)
    path, method = checkpoints.save(model_type, tmp_path), hk.HiPrune(budget=12)
    pruned = model_class(name)(pretrained=str(path), budget=12, **ON_CPU)
    pruned.stays_loaded, generate, calls = True, pruned.model.generate, []

    def recorded(**inputs):
        calls.append((inputs, generate(**inputs)))
        return calls[-1][1]

    pruned.model.generate = recorded
    evaluate(pruned, folder, limit=2)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=pruned.model.dtype).eval()
    assert len(calls) == 2
    whole = [model.generate(**inputs) for inputs, _ in calls]
    hk.apply_method(model, method)
    for (inputs, found), unpruned in zip(calls, whole):
        assert torch.equal(found, model.generate(**inputs)) and not torch.equal(found, unpruned)
        assert all(len(selection.indices) < math.prod(selection.grid) for selection in hk.last_selection(model))


def test_a_budget_that_an_image_refuses_is_one_line(task, tmp_path, capsys):
    folder, _ = task
    path = checkpoints.save("llava_next", tmp_path)
    capsys.readouterr()
    command = ["eval", "--model", str(path), "--tasks", "digits", "--include-path", str(folder), "--limit", "1"]
    assert main([*command, "--budgets", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hiprune eval: 1 tokens hiprune: budget: expected at least ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--tasks": "digitz"}, "tasks: lmms-eval has no 'digitz'; near: digits"),
        ({"--tasks": "loglikelihoods"}, "tasks: expected tasks whose output_type is generate_until, got loglikelihood"),
        ({"--tasks": "nodata"}, "tasks: nodata: FileNotFoundError"),
    ],
    ids=["unknown task", "loglikelihood", "no data"],
)
def test_tasks_are_refused_before_a_model_is_loaded(task, tmp_path, capsys, monkeypatch, changes, message):
    folder, _ = task
    digits_task.write_task(tmp_path, scenes=SCENES)
    (tmp_path / "digits.yaml").unlink()
    text = (folder / "digits.yaml").read_text()
    for name, before, after in [
        ("digits", "", ""),
        ("loglikelihoods", "output_type: generate_until", "output_type: loglikelihood"),
        ("nodata", "docs.jsonl", "missing.jsonl"),
    ]:
        (tmp_path / f"{name}.yaml").write_text(text.replace('"digits"', f'"{name}"').replace(before, after))
    monkeypatch.setattr(cli_eval, "model_class", lambda name: pytest.fail("a model was loaded"))
    given = {"--model": "digits", "--tasks": "digits", "--budgets": "8", "--include-path": str(tmp_path)} | changes
    assert main(["eval", *(word for pair in given.items() for word in pair)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("hiprune eval: ") and message in lines[-1] and len(lines) == 1
