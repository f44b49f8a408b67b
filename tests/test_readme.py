"""README's own method runs as it stands there, on every family of models."""

import re
from pathlib import Path

import pytest
import torch
from models import VLM_CASES

import hiprune_kernels as hk

README = (Path(__file__).parent.parent / "README.md").read_text()
OWN_METHOD = re.search(r"<!-- own method -->\n```python\n(.*?)```\n<!-- end -->", README, re.DOTALL)[1]


@pytest.mark.parametrize("name", VLM_CASES)
def test_own_method(name):
    model, inputs = VLM_CASES[name]()
    names = {"__name__": __name__, "model": model}
    exec(OWN_METHOD.replace("budget=192", "retention=0.4"), names)
    assert OWN_METHOD.count("budget=192") == 1
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=2)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
    for selection in hk.last_selection(model):
        assert selection.role_names == ("salient", "like the text")
        kept = int((selection.roles > 0).sum())
        assert kept == len(selection.indices) < len(selection.roles)
        assert selection.roles.unique().tolist() == [0, 1, 2]
