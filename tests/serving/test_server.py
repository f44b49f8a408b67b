"""A real server, asked by the openai client over the loopback interface."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from engine import TOKENS
from helpers import transformers_answers
from server import data_url, serve
from small_models import picture

PICTURES = [(0, 300, 400), (1, 500, 280)]
PROMPT = "USER: <image>\nwhat? ASSISTANT:"  # as the chat template makes it
TEXT = len(PROMPT.replace("<image>", ""))


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    options = ("--trust-request-mm-kwargs", "--max-num-seqs", "4", "--limit-mm-per-prompt", '{"image": 2}')
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(checkpoint("llava"), log, *options, hiprune={"budget": 192, "per_request": True}) as client:
        yield client


def ask(client, *images, text="what?", **kwargs):
    content = [{"type": "image_url", "image_url": {"url": data_url(picture(*image))}} for image in images]
    extra = {"ignore_eos": True, "return_token_ids": True} | ({"mm_processor_kwargs": kwargs} if kwargs else {})
    return client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        max_tokens=TOKENS,
        temperature=0,
        logprobs=True,
        extra_body=extra,
    )


def test_round_trip_equals_transformers(client, checkpoint):
    asked = [None, {"budget": 64}, {"budget": 576}]
    requests = [{"prompt": PROMPT, "images": [PICTURES[0]], "asked": own} for own in asked]
    expected = transformers_answers(checkpoint("llava"), requests, {"budget": 192})
    for own, answer, kept in zip(asked, expected, (192, 64, 576)):
        found = ask(client, PICTURES[0], **({"hiprune": own} if own else {}))
        assert found.usage.prompt_tokens == answer["prompt"] == TEXT + kept
        assert found.choices[0].token_ids == answer["tokens"]
        logprobs = [token.logprob for token in found.choices[0].logprobs.content]
        assert logprobs == pytest.approx(answer["logprobs"], abs=1e-3)


def test_at_once_as_alone(client):
    """Requests of several budgets, of two images, and of text alone, together."""
    cases = [((PICTURES[i % 2],), {"hiprune": {"budget": 40 * (i + 1)}}) for i in range(4)]
    cases += [(tuple(PICTURES), {}), ((), {}), ((PICTURES[1],), {})]

    def tokens(case):
        return ask(client, *case[0], **case[1]).choices[0].token_ids

    alone = [tokens(case) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        assert list(pool.map(tokens, cases)) == alone


BAD = {
    "no budget": {"budget": 0},
    "above": {"budget": 577},
    "half": {"budget": 1.5},
    "both": {"budget": 1, "retention": 0.5},
    "neither": {},
    "option": {"alpha": 0.5},
    "share": {"retention": 2},
    "type": 64,
}


@pytest.mark.parametrize("name", BAD)
def test_lives_on_after_a_bad_request(client, name):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=r"budget|retention"):
        ask(client, PICTURES[0], hiprune=BAD[name])
    assert ask(client, PICTURES[0]).usage.prompt_tokens == TEXT + 192


def test_lives_on_after_a_broken_image_and_a_video(client):
    from openai import APIStatusError

    for kind in ("image_url", "video_url"):
        content = [{"type": kind, kind: {"url": "data:image/png;base64,AAAA"}}, {"type": "text", "text": "what?"}]
        with pytest.raises(APIStatusError) as error:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
        assert error.value.status_code < 500
    assert ask(client, PICTURES[0]).usage.prompt_tokens == TEXT + 192
