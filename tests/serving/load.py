"""More mixed requests than the tests have, each compared with its answer alone: `python load.py [REQUESTS]`."""

import sys
import tempfile
from pathlib import Path

import conftest  # noqa: F401, the environment of vLLM
import small_models
from helpers import mixed_requests, run_engines

SIZES = [(308, 420), (560, 252), (196, 644), (112, 112), (448, 336)]
FAMILIES = {
    "llava": ("USER: {}{} which? ASSISTANT:", "<image>"),
    "llava_next": ("USER: {}{} which? ASSISTANT:", "<image>"),
    "qwen2_5_vl": ("{} {} which?", small_models.VISION_START + small_models.IMAGE_PAD + small_models.VISION_END),
}


def main(count: int) -> int:
    wrong = 0
    for family, (prompt, image) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = getattr(small_models, family)(Path(folder) / "model")
            options = {"model": str(model), "limit_mm_per_prompt": {"image": 2}, "max_num_batched_tokens": 2048}
            options["hf_overrides"] = {"hiprune": {"retention": 0.3, "per_request": True}}
            requests = mixed_requests(count, prompt, image, SIZES)
            rounds = [requests, "forget", *([request] for request in requests)]
            together, *alone = run_engines(Path(folder), {"options": options, "rounds": rounds})[0]["answers"]
            found = [ours["tokens"] != theirs["tokens"] for ours, (theirs,) in zip(together, alone, strict=True)]
            print(
                f"{family}: {count} requests, {sum(found)} answers differ from those of the request alone", flush=True
            )
            wrong += sum(found)
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 300) > 0)
