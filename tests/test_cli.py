"""The `hiprune` command: every error as one line, `info`, `check`, and the command as a process."""

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from cli_helpers import error_of
from models import tiny_llava
from safetensors.torch import load_file, save_file

import hiprune_kernels
from hiprune_kernels import cli, patch
from hiprune_kernels.patch import selfcheck
from hiprune_kernels.patch.encoders import ENCODERS

# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: {info,check,prune,compare,run,bench,analyze,calibrate,quality,eval,demo}"),
        (["prune"], "required: IMAGE"),
        (["draw"], "invalid choice: 'draw'"),
        (["prune", "PHOTO", "--budget", "many"], "--budget: invalid int value: 'many'"),
        (["prune", "PHOTO", "--budget", "3", "--retention", "0.5"], "not allowed with"),
        (["prune", "PHOTO", "--rule", "official_qwen"], "--rule: invalid choice"),
        (["prune", "PHOTO", "--dtype", "int8"], "--dtype: invalid choice"),
        (["prune", "nowhere.png"], "image: there is no file 'nowhere.png'"),
        (["prune", "PHOTO", "--budget", "0"], "budget: expected at least 1, got 0"),
        (["prune", "PHOTO", "--budget", "-5"], "budget: expected at least 1, got -5"),
        (["prune", "PHOTO", "--budget", "37"], "budget: expected 1 to 36 (6 x 6 tokens), got 37"),
        (["prune", "PHOTO", "--retention", "0"], "retention: expected a share in (0, 1], got 0.0"),
        (["prune", "PHOTO", "--retention", "1.5"], "retention: expected a share"),
        (["prune", "PHOTO", "--seed", "-1"], "seed: expected 0 to"),
        (["prune", "PHOTO", "--alpha", "nan"], "alpha: expected a share in [0, 1], got nan"),
        (
            ["prune", "PHOTO", "--object-layer", "0"],
            "object_layer: expected 1 to 4 (1-based, not behind the layer whose output are the features), got 0",
        ),
        (["prune", "PHOTO", "--object-layer", "5"], "object_layer: expected 1 to 4"),
        (["prune", "PHOTO", "--device", "toaster"], "device: 'toaster' cannot be used here"),
        (["prune", "PHOTO", "--device", "cuda:99"], "device: 'cuda:99' cannot be used here"),
        (["prune", "PHOTO", "--out", "no/such/place.png"], "out: there is no directory 'no/such'"),
        (["prune", "PHOTO", "--out", "picture.txt"], "out: expected a name that ends in .png"),
        (["prune", "PHOTO", "--json", "no/such/place.json"], "json: there is no directory 'no/such'"),
        (["prune", "PHOTO", "--model", "no/such/model"], "model: there is no directory 'no/such/model'"),
        (["prune", "PHOTO", "--model", "PHOTO"], "model: expected a directory or a hub id, got the file"),
        (["prune", "PHOTO", "--method", "nonsense"], "--method: invalid choice: 'nonsense'"),
        (
            ["prune", "PHOTO", "--method", "fastervlm", "--alpha", "0.2"],
            "alpha: FasterVLM has no such option; it has budget, retention",
        ),
        (
            ["prune", "PHOTO", "--method", "random", "--object-layer", "2"],
            "object-layer: Random has no such option; it has budget, retention, seed",
        ),
        (
            ["prune", "PHOTO", "--model", "PHOTO", "--seed", "2"],
            "seed: HiPrune has no such option; it has budget, retention, alpha, object-layer, rule",
        ),
        (["prune", "PHOTO", "--method", "random", "--seed", "-1"], "seed: expected"),
        (
            ["prune", "PHOTO", "--method", "divprune"],
            "DivPrune: needs features of the language model, expected a model with a language model, got CLIPVisionModel alone",
        ),
        (["run", "PHOTO"], "required: QUESTION"),
        (["run", "PHOTO", "what?", "--budget", "3"], "required: --model"),
        (
            ["run", "PHOTO", "what?", "--model", "no/such/model"],
            "one of the arguments --budget --retention is required",
        ),
        (["run", "PHOTO", "what?", "--model", "no/such/model", "--budget", "3"], "model: there is no directory"),
        (["run", "nowhere.png", "what?", "--model", "m", "--budget", "3"], "image: there is no file 'nowhere.png'"),
        (["run", "PHOTO", " ", "--model", "m", "--budget", "3"], "question: expected some text, got none"),
        (
            ["run", "PHOTO", "what?", "--model", "m", "--budget", "3", "--max-new-tokens", "0"],
            "max-new-tokens: expected at least 1, got 0",
        ),
        (
            ["run", "PHOTO", "what?", "--model", "m", "--budget", "3", "--method", "divprune", "--rule", "grid"],
            "rule: DivPrune has no such option; it has budget, retention",
        ),
        (["info", "--markdown"], "markdown: only the tables of --models"),
        (["info", "--models", "--json", "--markdown"], "not allowed with"),
        (["demo", "--threads", "0"], "threads: expected at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_line(capsys, photo, tiny_default, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *(photo if argument == "PHOTO" else argument for argument in arguments))


def test_broken_images(capsys, photo, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(Path(photo).read_bytes()[:2000])
    assert "is not an image that pillow can read" in error_of(capsys, "prune", str(tmp_path / "text.png"))
    assert "cannot be read: " in error_of(capsys, "prune", str(tmp_path / "cut.png"))
    assert "there is no file" in error_of(capsys, "prune", str(tmp_path))


def edited(checkpoint, tmp_path, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_unusable_checkpoints(capsys, photo, checkpoint, tmp_path):
    def error(directory):
        return error_of(capsys, "prune", photo, "--model", str(directory))

    (tmp_path / "empty").mkdir()
    assert "model: the configuration of" in error(tmp_path / "empty")
    assert "got model_type 'bert'" in error(edited(checkpoint, tmp_path / "1", model_type="bert"))
    assert "model: the configuration of" in error(edited(checkpoint, tmp_path / "2", model_type="unheard_of"))
    assert "cannot be loaded" in error(edited(checkpoint, tmp_path / "3", hidden_size=32))

    incomplete = edited(checkpoint, tmp_path / "4")
    weights = load_file(incomplete / "model.safetensors")
    name = next(name for name in weights if "layers.3.mlp.fc1.weight" in name)
    del weights[name]
    save_file(weights, incomplete / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of the model, first encoder.layers.3.mlp.fc1.weight" in error(incomplete)

    broken = edited(checkpoint, tmp_path / "5")
    (broken / "model.safetensors").write_bytes(b"\x08")
    assert "cannot be loaded" in error(broken)

    llava = tiny_llava()
    llava.config.vision_feature_layer = [-2, -3]
    llava.save_pretrained(tmp_path / "6")
    assert "vision_feature_layer: pruning needs the features of one layer, got [-2, -3]" in error(tmp_path / "6")
    config = json.loads((tmp_path / "6" / "config.json").read_text())
    config["vision_config"]["model_type"] = "dinov2"
    (tmp_path / "6" / "config.json").write_text(json.dumps(config))
    assert "expected a vision tower of type clip_vision_model, siglip_vision_model, got 'dinov2'" in error(
        tmp_path / "6"
    )

    weights = load_file(edited(checkpoint, tmp_path / "7") / "model.safetensors")
    weights["post_layernorm.bias"].fill_(1.0)
    weights["encoder.layers.0.self_attn.q_proj.bias"].fill_(float("nan"))
    save_file(weights, tmp_path / "7" / "edited" / "model.safetensors", metadata={"format": "pt"})
    assert "scores of layer 2: expected finite values, got 36 that are not" in error(tmp_path / "7" / "edited")


def test_hub_ids(capsys, photo, monkeypatch):
    from huggingface_hub import HfApi, errors

    class Answer:
        headers, request = {}, None

    def unreachable(self, *args, **kwargs):
        raise OSError("Name or service not known")

    def unknown(self, *args, **kwargs):
        raise errors.RepositoryNotFoundError("404", response=Answer())

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    message = error_of(capsys, "prune", photo, "--model", "some-owner/some-model-that-is-not-cached")
    assert "not in the local cache, and the hub cannot be reached" in message
    monkeypatch.setattr(HfApi, "model_info", unknown)
    assert "no such (public) model on the hub" in error_of(capsys, "prune", photo, "--model", "some-owner/no-model")


def test_missing_packages(capsys, photo, checkpoint, monkeypatch, tmp_path):
    for module in ("PIL.Image", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert f"{module}: pip install 'hiprune-kernels[images]'" in error_of(capsys, "prune", photo)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rich.progress", None)
        assert "pip install 'hiprune-kernels[demo]'" in error_of(capsys, "demo", "--out", str(tmp_path))


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no file"):
        cli.main(["prune", "nowhere.png", "--debug"])


def test_interrupt_is_quiet(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_a_bug_is_one_line_with_another_exit_code(capsys, monkeypatch):
    def buggy(args):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(cli, "_info", buggy)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "hiprune info: unexpected RuntimeError: first second (--debug shows where)\n"


# ---------------------------------------------------------------------------------------------------- info and process


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["hiprune-kernels"] == hiprune_kernels.__version__
    cpu = [kernel for kernel in found["kernels"] if kernel["device"] == "cpu"]
    assert {kernel["operators"] for kernel in cpu} == {"attention", "selection"}
    for kernel in found["kernels"]:
        line = next(x for x in text.splitlines() if x.split()[:2] == [kernel["device"], kernel["operators"]])
        assert kernel["implementation"] in line and kernel["reason"] in line
    assert all(device in text for device in found["devices"])


MARKERS = "<!-- hiprune info --models --markdown -->\n", "<!-- end -->"  # around the tables in README.md
UPDATE = """hiprune info --models --markdown > /tmp/t && sed -i -e '/^<!-- hiprune info/,/^<!-- end/{//!d}' -e '/^<!-- hiprune info/r /tmp/t' README.md"""


def paragraphs(lines):
    """The notes, which stand below their lines, put together again."""
    groups = itertools.groupby(lines, key=lambda line: line.startswith(" " * 6))
    return [" ".join(line.strip() for line in group) for indented, group in groups if indented]


def test_models_are_those_of_the_tables(capsys):
    assert cli.main(["info", "--models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in found["models"]] == list(patch.FAMILIES)
    assert [row["model_type"] for row in found["encoders"]] == list(ENCODERS)
    rows = {row["model_type"]: row for row in found["models"]}
    llava = {
        "name": patch.FAMILIES["llava"].kind.name,
        "budget_per": "image",
        "notes": patch.FAMILIES["llava"].kind.notes,
    }
    layers = {"object_layer": 9, "feature_layer": 23, "layers": 24}  # the paper's, of CLIP-L
    assert rows["llava"] == {**llava, **layers, "model_type": "llava"}
    assert cli.main(["info", "--models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if " llava " in line)
    assert line.split() == f"{llava['name']} llava image 9 of 24 23 of 24".split()
    assert {row["notes"] for table in found.values() for row in table} - {""} <= set(paragraphs(lines))
    clip = next(row for row in found["encoders"] if row["model_type"] == "clip_vision_model")
    assert (clip["prefix_tokens"], clip["object_share"]) == (1, 0.375)
    assert sum(line.startswith("  CLIP ") and "0.375 of the depth" in line for line in lines) == 1


def test_readme_has_the_table_of_models(capsys):
    assert cli.main(["info", "--models", "--markdown"]) == 0
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    _, start, rest = readme.partition(MARKERS[0])
    table, end, _ = rest.partition(MARKERS[1])
    assert start and end and table == capsys.readouterr().out, f"update it by: {UPDATE}"


def test_check(capsys, monkeypatch):
    assert cli.main(["check", "llava", "vit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"stock code of transformers {transformers.__version__}") and len(lines) == 4
    for line, model_type in zip(lines[1:], ("llava", "vit")):
        assert re.fullmatch(rf"  {model_type} +right  \([0-9.]+ s\)", line)
    assert lines[3] == "2 of 2 right"
    difference = {"deit": "features that are off by 3", "vit": ""}
    monkeypatch.setattr(selfcheck, "check_model", lambda name: selfcheck.Verdict(name, difference.get(name, "")))
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # the bar is not needed
    assert cli.main(["check"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(patch.FAMILIES)
    assert lines[-1] == f"{len(patch.FAMILIES) - 1} of {len(patch.FAMILIES)} right"
    assert [line.split("  (")[0].split(maxsplit=1)[1] for line in lines if "deit" in line] == [difference["deit"]]
    assert cli.main(["check", "lava"]) == 2
    assert "hiprune check: model_type: expected one of llava, " in capsys.readouterr().err


def test_the_bar_of_check(capsys, monkeypatch):
    """Over the families, where there is a terminal; it goes away at the end."""
    from rich import console

    monkeypatch.setattr(selfcheck, "check_model", lambda name: selfcheck.Verdict(name, ""))
    for terminal in (True, False):
        monkeypatch.setattr(console, "Console", functools.partial(console.Console, force_terminal=terminal))
        assert cli.main(["check", "llava", "vit"]) == 0
        shown = capsys.readouterr().out
        assert ("checking" in shown and "100%" in shown) == terminal and "2 of 2 right" in shown


def test_a_package_that_is_not_installed_is_said_to_be(monkeypatch):
    from hiprune_kernels import environment

    assert environment._version("no-such-package-here") == "not installed"
    monkeypatch.setattr(environment.Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
    assert environment.processor_name()  # Python's guess


def test_the_command_as_a_process():
    module = [sys.executable, "-m", "hiprune_kernels"]
    done = subprocess.run([*module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"hiprune-kernels {hiprune_kernels.__version__}\n")
    failed = subprocess.run([*module, "prune", "nowhere.png"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr) == (2, "hiprune prune: image: there is no file 'nowhere.png'\n")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*module, "info"], **pipes, text=True, env=buffered) as closed:
        closed.stdout.close()  # as `hiprune info | head -0` does
        assert closed.stderr.read() == "" and closed.wait() == 141
