"""What pruning gains in vLLM: one engine, budgets in turn by requests' own options. `python bench/serving.py --help`.

The tower is of the real size of CLIP-L/14-336; the language model has a tenth of the weights of LLaVA-1.5-7B's, so its
share of the time is smaller than there. Weights are random, in float32. `.ci/serving set-up` makes the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "serving"))

BUDGETS = (576, 192, 64)
PROMPT = "USER: <image>\nDescribe the picture. ASSISTANT:"
TIMES = ("seconds", "encoder", "language")
spent = {"encoder": 0.0, "language": 0.0, "blocks": 0}


def timed(cls: type, name: str, key: str, after) -> None:
    """Add what a method takes to `spent`."""
    stock = getattr(cls, name)

    def method(self, *args, **kwargs):
        started = time.perf_counter()
        result = stock(self, *args, **kwargs)
        spent[key] += time.perf_counter() - started
        after()
        return result

    setattr(cls, name, method)


def measure(model: Path, rounds: int, tokens: int) -> list[dict]:
    from small_models import picture
    from vllm import LLM, SamplingParams

    from hiprune_kernels.vllm.llava import Llava

    pool = None

    def note_blocks() -> None:
        if pool is not None:
            spent["blocks"] = max(spent["blocks"], pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    timed(Llava, "embed_multimodal", "encoder", lambda: None)
    timed(Llava, "forward", "language", note_blocks)
    llm = LLM(
        str(model),
        dtype="float32",
        max_model_len=2048,
        max_num_batched_tokens=4096,
        max_num_seqs=4,
        enforce_eager=True,
        limit_mm_per_prompt={"image": 1},
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        block_size=32,
        seed=0,
        hf_overrides={"hiprune": {"retention": 1.0, "per_request": True}},
    )
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    seeds = iter(range(10**6))  # a new picture each time: the encoder's output is cached by picture

    def run(budget: int, requests: int, new_tokens: int) -> dict:
        inputs = [
            {
                "prompt": PROMPT,
                "multi_modal_data": {"image": picture(next(seeds), 336, 448)},
                "mm_processor_kwargs": {"hiprune": {"budget": budget}},
            }
            for _ in range(requests)
        ]
        spent.update(encoder=0.0, language=0.0, blocks=0)
        started = time.perf_counter()
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        outputs = llm.generate(inputs, sampling, use_tqdm=False)
        seconds = time.perf_counter() - started
        expected = len(PROMPT) - len("<image>") + budget
        lengths = {len(output.prompt_token_ids) for output in outputs}
        if lengths != {expected}:
            raise SystemExit(f"prompts: expected {expected} tokens, got {lengths}")
        row = {"budget": budget, "requests": requests, "tokens": new_tokens, "prompt": expected}
        return row | {"seconds": seconds} | spent

    rows = []
    run(64, 1, 2)
    for number in range(rounds):
        for requests, new_tokens in ((1, 1), (4, tokens)):
            for budget in BUDGETS if number % 2 == 0 else BUDGETS[::-1]:
                rows.append(run(budget, requests, new_tokens))
                print({key: round(value, 2) for key, value in rows[-1].items()}, flush=True)
    return rows


def table(rows: list[dict], title: str) -> str:
    """Medians, and ratios to unpruned, in Markdown."""
    lines = [f"# vLLM, pruned against unpruned\n\n{title}\n"]
    lines += [
        "| requests x new tokens | budget | prompt tokens | KV blocks | time | tokens/s | encoder | language model |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    kinds = sorted({(row["requests"], row["tokens"]) for row in rows})
    for kind in kinds:
        base: dict[str, float] = {}
        for budget in BUDGETS:
            own = [row for row in rows if (row["requests"], row["tokens"], row["budget"]) == (*kind, budget)]
            median = {key: statistics.median(row[key] for row in own) for key in (*TIMES, "blocks")}
            base = base or median
            ratio = {key: median[key] / base[key] for key in median}
            share = median["encoder"] / median["seconds"]
            speed = kind[0] * kind[1] / median["seconds"]
            lines.append(
                f"| {kind[0]} x {kind[1]} | {budget} | {own[0]['prompt']} "
                f"| {median['blocks']:.0f} ({ratio['blocks']:.2f}) "
                f"| {median['seconds']:.2f} s ({ratio['seconds']:.2f}) | {speed:.2f} "
                f"| {median['encoder']:.2f} s ({ratio['encoder']:.2f}; {share:.0%} of the time) "
                f"| {median['language']:.2f} s ({ratio['language']:.2f}) |"
            )
        pruned = [row for row in rows if (row["requests"], row["tokens"], row["budget"]) == (*kind, BUDGETS[-1])]
        whole, encoder = (statistics.median(row[key] for row in pruned) for key in ("seconds", "encoder"))
        half = (whole - encoder / 2) / base["seconds"]
        lines.append(
            f"| {kind[0]} x {kind[1]} | {BUDGETS[-1]}, by arithmetic, with an encoder twice as fast "
            f"for it alone | | | ({half:.2f}) | | | |"
        )
    lines.append(
        "\nIn brackets: the ratio to unpruned. The time of 1 x 1 is that to the first token. What the encoder takes "
        "bounds the gain.\n"
    )
    return "\n".join(lines)


def processor_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of all budgets (default: 5)")
    parser.add_argument("--tokens", type=int, default=8, help="new tokens of each of four requests (default: 8)")
    parser.add_argument("--tiny", action="store_true", help="small models, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "serving", help="without suffix"
    )
    args = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    import conftest  # sets the number of threads that tests have

    os.environ.update(conftest.ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": threads})
    from small_models import HEAVY_TEXT, REAL_VISION, llava

    with tempfile.TemporaryDirectory() as folder:
        os.environ["VLLM_CACHE_ROOT"] = f"{folder}/cache"
        sizes = (None, None) if args.tiny else (REAL_VISION, HEAVY_TEXT)
        rows = measure(llava(Path(folder) / "model", *sizes), args.rounds, args.tokens)
    import vllm

    models = "tiny models" if args.tiny else "CLIP-L/14-336 and a language model of 607 M parameters"
    title = f"{processor_name()}, {threads} threads; vLLM {vllm.__version__}; {models}, float32, random weights; "
    title += f"medians of {args.rounds} rounds in one engine, budgets in turn."
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps({"title": title, "rows": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(rows, title))
    print(table(rows, title))


if __name__ == "__main__":
    main()
