"""Models that `tp_plan` of transformers shares out over two processes answer as in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tensor_parallel.save(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of two processes found."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(tensor_parallel.__file__)), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_tokens_and_choices_are_those_of_one_process(folder, ranks):
    expected = tensor_parallel.found(folder)
    assert [rank["found"] for rank in ranks] == [expected, expected]
    for name in tensor_parallel.MODELS:  # each method answers in its own way, so that none was left out
        answers = [json.dumps(expected[f"{name} {method}"]) for method in tensor_parallel.METHODS]
        assert len(set(answers)) == len(answers)


def test_each_process_by_its_own_heads_would_choose_otherwise(ranks):
    """What the first test would miss if attention of text were the same in both processes anyway."""
    right = ranks[0]["found"]["llava fastv"][1]
    first, second = (rank["own heads only"][1] for rank in ranks)
    assert first != second and right not in (first, second)


def test_a_vision_encoder_that_is_shared_out_is_refused(ranks):
    for rank in ranks:
        assert len(rank["refusals"]) == 2
        assert all(said.startswith("model: expected a vision encoder with all heads") for said in rank["refusals"])


def test_nothing_was_started_here():
    assert not torch.distributed.is_initialized()
