"""bench/ray_batch.py on two actors, against the same replica in this process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import digits_task

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from ray_batch import Answerer, rows_of  # noqa: E402

QUESTIONS = 18


def run(folder, *options):
    command = [sys.executable, str(ROOT / "bench" / "ray_batch.py"), "--model", "digits", "--images", str(folder)]
    command += ["--questions", str(folder / "questions.jsonl"), "--max-new-tokens", "3", *options]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_two_actors_answer_as_one_process(tmp_path):
    docs = digits_task.write_task(tmp_path, scenes=2)
    assert len(docs) == QUESTIONS
    asked = [{"image": Path(doc["image"]).name, "question": doc["question"]} for doc in docs]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    done = run(tmp_path, "--budget", "4", "--actors", "2", "--out", str(tmp_path / "answers.jsonl"))
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^{QUESTIONS} answers of 2 actors", done.stdout, re.MULTILINE), done.stdout
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    rows = rows_of(tmp_path / "questions.jsonl", tmp_path, 3)
    own, other = Answerer("digits", 4, "cpu"), Answerer("digits", 144, "cpu")
    answers = [own(row)["answer"] for row in rows]
    assert found == [each | {"answer": answer, "kept": 4} for each, answer in zip(asked, answers)]
    assert answers != [other(row)["answer"] for row in rows]  # or it would not show that the replicas prune


def test_a_missing_picture_is_one_line(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"image": "no.png", "question": "what"}\n')
    done = run(tmp_path, "--budget", "12", "--out", str(tmp_path / "answers.jsonl"))
    assert done.returncode == 1 and done.stderr == f"questions: line 1: there is no file '{tmp_path / 'no.png'}'\n"
