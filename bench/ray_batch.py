"""Answer many questions about images with Ray Data, on several processors or machines at once.

Each actor holds a replica of its own of the model, patched when it is loaded. Answers do not depend on how many actors
there are, or which of them answers: one question is asked at a time.

    pip install 'ray[data]'
    python bench/ray_batch.py --model llava-hf/llava-1.5-7b-hf --images photos --questions questions.jsonl \
        --budget 192 --actors 4 --gpus 1 --out answers.jsonl

Each line of the questions is {"image": name of a file in the folder of images, "question": text}; each line of the
answers has the same, "answer" and "kept", the number of visual tokens that were kept, in the order of the questions.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


class Answerer:
    """A patched replica; Ray makes one an actor."""

    def __init__(self, model: str, budget: int, device: str) -> None:
        import hiprune_kernels as hk
        from hiprune_kernels.loading import load_model

        method = hk.HiPrune(budget=budget)
        loaded = load_model(model, method, dtype="auto", device=device, answers=True)
        self.model, self.processor = hk.apply_method(loaded.model, method), loaded.processor

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import torch

        import hiprune_kernels as hk
        from hiprune_kernels.cli_common import open_image

        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        bos = self.processor.tokenizer.bos_token  # which some templates write themselves
        inputs = self.processor(
            images=open_image(row["path"]),
            text=text,
            return_tensors="pt",
            add_special_tokens=not (bos and text.startswith(bos)),
        ).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            sequence = self.model.generate(**inputs, do_sample=False, max_new_tokens=int(row["max_new_tokens"]))[0]
        answer = self.processor.decode(sequence[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        kept = sum(len(selection.indices) for selection in hk.last_selection(self.model))
        return row | {"answer": answer.strip(), "kept": kept, "actor": os.getpid()}


def rows_of(questions: Path, images: Path, max_new_tokens: int) -> list[dict[str, Any]]:
    """What each call gets; a missing picture is found now, rather than by an actor."""
    rows = []
    for i, line in enumerate(questions.read_text().splitlines()):
        asked = json.loads(line)
        path = images / asked["image"]
        if not path.is_file():
            raise SystemExit(f"questions: line {i + 1}: there is no file {str(path)!r}")
        rows.append(asked | {"path": str(path.resolve()), "place": i, "max_new_tokens": max_new_tokens})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID")
    parser.add_argument("--images", required=True, type=Path, metavar="DIR")
    parser.add_argument("--questions", required=True, type=Path, metavar="FILE")
    parser.add_argument("--budget", required=True, type=int, metavar="N", help="visual tokens to keep")
    parser.add_argument("--actors", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--gpus", type=float, default=0, metavar="N", help="of each actor (default: 0, on the CPU)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = rows_of(args.questions, args.images, args.max_new_tokens)

    import ray

    ray.data.DataContext.get_current().wait_for_min_actors_s = 3600  # or the first that is loaded takes all questions
    blocks = min(len(rows), 8 * args.actors)  # several for each, so that a slow one does not hold up the end
    replicas = ray.data.ActorPoolStrategy(size=args.actors)
    made_of = (args.model, args.budget, "cuda" if args.gpus else "cpu")
    answered = ray.data.from_items(rows, override_num_blocks=blocks).map(
        Answerer, fn_constructor_args=made_of, compute=replicas, num_gpus=args.gpus
    )
    found = sorted(answered.take_all(), key=lambda row: row["place"])
    hidden = ("path", "place", "max_new_tokens", "actor")
    lines = [json.dumps({name: value for name, value in row.items() if name not in hidden}) for row in found]
    args.out.write_text("".join(f"{line}\n" for line in lines))
    print(f"{len(found)} answers of {len({row['actor'] for row in found})} actors in {args.out}")


if __name__ == "__main__":
    main()
