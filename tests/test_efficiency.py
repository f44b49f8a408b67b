"""`hiprune bench` and what it is made of: operations by hand, parts that add up, sizes as published, and bad input."""

import json
import time

import pytest
import torch
from checkpoints import photograph, save
from cli_helpers import error_of
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import hiprune_kernels as hk
from hiprune_kernels import cli, cli_bench, efficiency, sizes
from hiprune_kernels.patch import tap
from hiprune_kernels.patch.encoders import find_encoder
from hiprune_kernels.processing import default_image_processor, vision_inputs
from hiprune_kernels.quality import checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made, folder = {}, tmp_path_factory.mktemp("efficiency")

    def path(model_type):
        if model_type not in made:
            made[model_type] = str(save(model_type, folder / model_type))
        return made[model_type]

    return path


def flops(function):
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


def test_operations_of_attention_are_counted():
    """Two products of a query's 5 rows with 7 keys, 8 wide, in 3 heads of 2 images; scores alone take one."""
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    product = 2 * 2 * 3 * 5 * 7 * 8
    assert flops(lambda: hk.attention_with_scores(query, key, key)) == 2 * product
    assert flops(lambda: hk.attention_scores(query, key)) == product
    lengths = torch.tensor([0, 4, 10], dtype=torch.int32)
    packed = torch.randn(10, 3, 8)
    options = {"cu_seqlens_q": lengths, "cu_seqlens_k": lengths, "max_seqlen_q": 6}
    assert flops(lambda: hk.attention_scores_varlen(packed, packed, **options)) == 2 * (16 + 36) * 3 * 8
    assert flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key)) == 2 * product


def small_llava():
    """The LLaVA of `hiprune quality`, and a prompt of 148 tokens, 144 of an image."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(), dtype=torch.float32).eval()
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, 144), 4), torch.tensor([[6, 7, 5]])], dim=1)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, 96, 96)}


def test_operations_of_a_prefill():
    """A linear layer of the language model for each token that goes through it; pruning takes away what it drops."""
    model, inputs = small_llava()
    whole = efficiency.prefill_flops(model, inputs)
    with hk.hiprune(model, budget=44):
        pruned = efficiency.prefill_flops(model, inputs)
    text = model.config.text_config
    dropped, width = 100, text.hidden_size
    # Three layers of 4 projections and an MLP of 3, one encoder layer from the attention's output on, and the projector.
    language = 2 * dropped * text.num_hidden_layers * (4 * width**2 + 3 * width * text.intermediate_size)
    vision = 2 * dropped * (width**2 + 2 * width * 288) + 2 * dropped * 2 * width**2
    attention = text.num_hidden_layers * 4 * width * (148**2 - 48**2) + 4 * width * 100 * 145
    behind = 2 * 145 * (4 * width**2 + 2 * width * 288) + 4 * 145**2 * width  # the layer that nobody reads
    scores = 2 * 145 * 145 * width  # of the feature layer, whose output is computed for kept rows alone
    assert whole - pruned == pytest.approx(language + vision + attention + behind - scores, rel=0.005)


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_parts_add_up(saved, model_type):
    """Encoder, connector (with what is selected behind the encoder) and prefill are the time to the first token."""
    model = AutoModelForImageTextToText.from_pretrained(saved(model_type), dtype=torch.float32).eval()
    image = Image.new("RGB", (90, 60), (90, 120, 30))
    inputs = vision_inputs(model, default_image_processor(model.config), image, language=True)
    inputs = efficiency.with_text(inputs, 60)
    ways = {"all": None, "a": hk.HiPrune(retention=0.3), "b": hk.DivPrune(retention=0.3), "c": hk.FastV(retention=0.3)}
    steps = []
    found = efficiency.measure(model, inputs, ways, rounds=2, new_tokens=3, step=lambda: steps.append(0))
    assert len(steps) == 3 * (len(ways) + 1) and not hk.is_patched(model)
    released = found.pop(efficiency.RELEASED)
    assert len(released.times.encoder) == 2 and min(released.times.encoder) > 0 and released.times.prefill == []
    length = inputs["input_ids"].shape[1]
    for name, measured in found.items():
        times = measured.times
        assert len(times.first_token) == len(times.decode) == 2 and all(x > 0 for x in times.encoder + times.prefill)
        for i, total in enumerate(times.first_token):
            late = 0 if name in ("all", "a") else times.selection[i]  # selected in front of the language model
            parts = times.encoder[i] + times.connector[i] + times.prefill[i] + late
            assert 0 < parts <= total and times.connector[i] > -1e-6
        assert min(times.scores) >= 0 and (max(times.scores) == 0) == (name in ("all", "b"))
        assert name != "a" or max(times.scores) < min(times.encoder)
        assert (measured.prompt_tokens == length) == (name == "all") and (max(times.selection) == 0) == (name == "all")
    assert max(found[name].prompt_tokens for name in "abc") < 0.75 * length
    assert found["a"].flops < found["all"].flops and found["a"].cache_mib < found["all"].cache_mib
    text = model.config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    expected = 2 * length * text.num_hidden_layers * text.num_key_value_heads * width * 4 / 2**20
    assert found["all"].cache_mib == pytest.approx(expected)


def test_logits_that_are_not_finite_are_an_error(saved):
    model = AutoModelForImageTextToText.from_pretrained(saved("llava"), dtype=torch.float32).eval()
    inputs = vision_inputs(model, default_image_processor(model.config), Image.new("RGB", (48, 48)), language=True)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(RuntimeError, match="all: expected finite logits, got 1 that are not"):
        efficiency.measure(model, efficiency.with_text(inputs, 60), {"all": None}, rounds=1)


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "qwen2_5_vl"])
def test_the_released_codes_encoder(saved, model_type, monkeypatch):
    """Eager, with a matrix of each layer kept where attention returns it; afterwards all is as before."""
    model = AutoModelForImageTextToText.from_pretrained(saved(model_type), dtype=torch.float32).eval()
    inputs = vision_inputs(model, default_image_processor(model.config), Image.new("RGB", (60, 60)), language=True)
    family, config, layers = find_encoder(model)
    before, seen = config._attn_implementation, []
    attention = layers[0].get_submodule(family.attention)
    handle = attention.register_forward_hook(
        lambda module, args, output: seen.append(module.config._attn_implementation)
    )
    own = len(attention._forward_hooks)  # this one, and transformers' where it captures outputs
    with efficiency.as_released(model), torch.no_grad():
        assert len(attention._forward_hooks) == own + 1
        efficiency.encode(model, inputs)
    handle.remove()
    assert before == "sdpa" == config._attn_implementation and set(seen) == {"eager"}
    assert len(attention._forward_hooks) == own - 1


def test_where_it_does_not_pay():
    pays = efficiency.Gain(0.9, 0.001, 0.003, 50)
    assert efficiency.without_gain({"a": pays._replace(ratio=0.5), "b": pays}) == []
    assert efficiency.without_gain({"a": pays._replace(ratio=1.02), "b": pays}) == [
        "a: pruning does not pay here, the first token takes 1.02 times as long",
        "it pays with b",
    ]
    found = efficiency.without_gain({"a": efficiency.Gain(1.5, 0.003, 0.002, 50)})
    assert "3.0 ms more in front of the language model, 2.0 ms less in it for 50 dropped tokens" in found[0]
    assert "from about 75 on" in found[0] and found[-1].startswith("none of these budgets pays: ")


def test_the_clock_of_scores(monkeypatch):
    """Of the two layers that HiPrune reads each call counts once, and the wrappers are gone afterwards."""
    model, inputs = small_llava()
    slow = []

    def sleeping(*args, stock=tap.Attention.column_scores, **kwargs):
        slow.append(0)
        time.sleep(0.05)
        return stock(*args, **kwargs)

    monkeypatch.setattr(tap.Attention, "column_scores", sleeping)
    found = efficiency.measure(model, inputs, {"all": None, "a": hk.HiPrune(budget=40)}, rounds=1, new_tokens=1)
    (scores,), (encoder,) = found["a"].times.scores, found["a"].times.encoder
    assert len(slow) == 3 and 0.05 <= scores < encoder  # two runs to check and count, one on the clock
    assert found["all"].times.scores == [0] and tap.Attention.column_scores is sleeping


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 7.06),
        ("llava-1.5-13b", 13.35),
        ("llava-next-7b", 7.06),
        ("llava-onevision-0.5b", 0.89),
        ("llava-onevision-7b", 8.03),
        ("qwen2-vl-2b", 2.21),
        ("qwen2.5-vl-3b", 3.75),
        ("qwen2.5-vl-7b", 8.29),
    ],
)
def test_sizes_are_the_published_ones(name, billions):
    assert sizes.bytes_of(name, torch.bfloat16) / 2e9 == pytest.approx(billions, abs=0.01)


def test_random_models_are_seeded_and_fit(monkeypatch):
    def tiny():
        prefix, options = sizes._onevision(sizes._QWEN2_0_5B | {"num_hidden_layers": 1, "vocab_size": 152000})
        options["vision_config"] = options["vision_config"] | {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 64,
        }
        options["text_config"] = options["text_config"] | {"hidden_size": 28, "intermediate_size": 32}
        return prefix, options

    monkeypatch.setitem(sizes.CONFIGS, "tiny", tiny)
    first, second = (sizes.random_model("tiny", dtype=torch.bfloat16, device=torch.device("cpu")) for _ in range(2))
    assert first.dtype == torch.bfloat16 and not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    monkeypatch.setattr(sizes, "_free_bytes", lambda device: 10)
    with pytest.raises(
        ValueError, match=r"config: the weights of tiny take \d+\.\d GiB in bfloat16, but 0.0 GiB are free"
    ):
        sizes.random_model("tiny", dtype=torch.bfloat16, device=torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- command line


def test_command(capsys, saved, tmp_path):
    arguments = ["--model", saved("llava"), "--budgets", "9,4", "--methods", "hiprune,random", "--rounds", "1"]
    assert cli.main(["bench", *arguments, "--new-tokens", "2", "--batch", "2", "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in found["rows"]] == ["all tokens", "hiprune 9", "hiprune 4", "random 9", "random 4"]
    whole, nine, four, *_ = found["rows"]
    assert found["released_encoder_seconds"] > 0
    assert (
        whole["prompt_tokens"] - nine["prompt_tokens"] == 36 - 9 and nine["prompt_tokens"] - four["prompt_tokens"] == 5
    )
    assert whole["first_token_ratio"] == 1 and nine["tflops"] < whole["tflops"]
    assert json.loads((tmp_path / "llava.json").read_text()) == found
    text = (tmp_path / "llava.md").read_text()
    assert "attention matrices of all layers: " in text and "times that of hiprune 9" in text
    assert "| hiprune 9 |" in text and found["environment"]["versions"]["torch"] in text and "2 prompts of" in text
    with Image.open(tmp_path / "llava.png") as picture:
        assert picture.width > 500
    assert cli.main(["bench", *arguments, "--question", "w4 w5"]) == 0
    printed = capsys.readouterr().out
    assert "first token ms" in printed and "hiprune 4" in printed and "A100" not in printed


def test_the_papers_figures_stand_beside_llava_next(capsys, saved):
    assert cli.main(["bench", "--model", saved("llava_next"), "--retentions", "0.3", "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "A100-PCIE (40G), bfloat16, eager attention; HiPrune, table 6" in printed and "320, 6.74, 36.3" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "M", "--budgets", "9,x"],
            "budgets: expected different whole numbers from 1 with commas in between",
        ),
        (["--model", "M", "--budgets", "9,9"], "budgets: expected different whole numbers"),
        (["--model", "M", "--budgets", "0"], "budgets: expected different whole numbers"),
        (["--model", "M", "--retentions", "1.5"], "retentions: expected different shares above 0, at most 1,"),
        (["--model", "M", "--methods", "nope"], "methods: expected names among hiprune"),
        (["--model", "M", "--methods", "random,random"], "methods: expected each method once"),
        (["--model", "M", "--budgets", "99999"], "budget: expected 1 to 36 (6 x 6 tokens), got 99999"),
        (["--model", "M", "--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["--model", "M", "--batch", "0"], "batch: expected at least 1, got 0"),
        (["--model", "M", "--out", "nowhere"], "out: there is no directory 'nowhere'"),
        (["--config", "nope"], "config: expected one of llava-1.5-7b, "),
        (["--config", "llava-1.5-7b", "--question", "what?"], "question: expected none with --config"),
        (["--config", "llava-1.5-7b", "--model", "M"], "not allowed with argument"),
    ],
    ids=lambda value: " ".join(value[2:] or value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, saved, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [saved("llava") if each == "M" else each for each in arguments]
    assert message in error_of(capsys, "bench", *given)
    assert not list(tmp_path.iterdir())


def test_a_picture_from_disk(capsys, saved, tmp_path):
    photo = str(photograph(tmp_path / "photo.png"))
    assert (
        cli.main(["bench", "--model", saved("llava"), "--image", photo, "--budgets", "9", "--rounds", "1", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["prompt"] > 36
    assert cli_bench.UNPRUNED == "all tokens"
