"""A task for lmms-eval that needs no download: questions about generated scenes of digits, in files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hiprune_kernels.quality import scenes_of

_YAML = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
task: "digits"
test_split: test
output_type: {output_type}
doc_to_visual: !function digits_docs.visual
doc_to_text: !function digits_docs.text
doc_to_messages: !function digits_docs.messages
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 3
  temperature: 0
  do_sample: false
process_results: !function digits_docs.results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
_DOCS = """\
from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": visual(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def results(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}
"""


def write_task(folder: Path, *, scenes: int, output_type: str = "generate_until") -> list[dict[str, str]]:
    """Write the task, its data and pictures, and give its questions."""
    docs = []
    for i, scene in enumerate(scenes_of(scenes)):
        path = folder / f"{i}.png"
        Image.fromarray(scene.pixels).save(path)
        for question, answer in scene.questions(np.random.default_rng(i)):
            docs.append({"image": str(path), "question": question, "answer": answer})
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "digits.yaml").write_text(_YAML.format(data=folder / "docs.jsonl", output_type=output_type))
    (folder / "digits_docs.py").write_text(_DOCS)
    return docs
