"""Ask engines of vLLM, in a process of their own: `python engine.py WORK.json`.

The file has a list of engines: {"options": of LLM(), "rounds": [[request, ...], ...], "break": bool}. The requests of a
round are handed over together; a round may also be the name of something to do, see `main`. A request is {"prompt", "images": [[seed, height, width], ...], "asked"}. Each answer is
{"prompt": tokens, "tokens": [...], "logprobs": [...]}. They are written to the same file, as "answers".
"""

import json
import os
import sys
from pathlib import Path

from small_models import picture

TOKENS = 8


def record(worker):
    """In a worker: note what is picked before the first rank's word counts."""
    from hiprune_kernels.vllm import encoder

    encoder.noted = noted = []
    stock = encoder.of_first_rank

    def of_first_rank(tensor):
        if tensor.dtype.itemsize == 8:  # indices, not roles
            noted.append(tensor.tolist())
        return stock(tensor)

    encoder.of_first_rank = of_first_rank


def noted(worker):
    from hiprune_kernels.vllm import encoder

    found = list(encoder.noted)
    encoder.noted.clear()
    return found


def without_all_reduce(worker):
    """In a worker: each rank goes by its own heads."""
    from hiprune_kernels.vllm import clip

    clip.over_all_heads = lambda mean, shards: mean


def with_stock_model(worker):
    """In a worker: the model that it would have without the plugin."""
    model = worker.model_runner.get_model()
    model.__class__ = type(model).__mro__[1]


def inputs(request):
    given = {"prompt": request["prompt"]}
    if request.get("images"):
        given["multi_modal_data"] = {"image": [picture(*image) for image in request["images"]]}
    if request.get("asked"):
        given["mm_processor_kwargs"] = {"hiprune": request["asked"]}
    return given


def answers(llm, requests):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=TOKENS, min_tokens=TOKENS, temperature=0, logprobs=1)
    outputs = llm.generate([inputs(request) for request in requests], sampling, use_tqdm=False)
    return [
        {
            "prompt": len(output.prompt_token_ids),
            "cached": output.num_cached_tokens,
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                places[token].logprob for token, places in zip(output.outputs[0].token_ids, output.outputs[0].logprobs)
            ],
        }
        for output in outputs
    ]


def main(path):
    work = json.loads(Path(path).read_text())
    from vllm import LLM

    common = {"dtype": "float32", "max_model_len": 2048, "enforce_eager": True, "seed": 0, "block_size": 32}
    common |= {"kv_cache_memory_bytes": 256 << 20, "max_num_seqs": 8}
    for engine in work:
        llm = LLM(**(common | engine["options"]))
        if engine.get("record"):
            llm.collective_rpc(record)
        engine["answers"], engine["picks"] = [], []
        for requests in engine["rounds"]:
            if requests == "break":
                llm.collective_rpc(without_all_reduce)
                continue
            if requests == "forget":
                llm.reset_prefix_cache()
                continue
            if requests == "stock":
                llm.collective_rpc(with_stock_model)
                continue
            try:
                engine["answers"].append(answers(llm, requests))
            except Exception as error:
                engine["answers"].append(repr(error))
                break
            if engine.get("record"):
                engine["picks"].append(llm.collective_rpc(noted))
        Path(path).write_text(json.dumps(work))
        llm.llm_engine.engine_core.shutdown()
        del llm


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    main(sys.argv[1])
