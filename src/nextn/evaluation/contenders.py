"""Those who are measured, each in a process of its own that answers prompts from its standard input.

    python contenders.py '{"kind": "llama.cpp", "gguf": "model.gguf", "threads": 2}'

One line of JSON comes in, {"prompt": [token ids], "new_tokens": 128}, and one goes out. A process each keeps memory
apart, and lets an engine live in an environment of its own: this file imports nextn only for the contenders that are
nextn. All decode greedily, batch 1, and all are timed from the prompt's token ids to the last new token.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

Answer = dict[
    str, Any
]  # `count` of new tokens, and where the engine gives them `tokens`, `accepted`, `origins`, `parts`
Answering = Callable[[list[int], int], Answer]


def nextn(
    model: str, dtype: str, heads: int | None, eager: bool, replay: list[int] | None, threads: int
) -> tuple[Answering, dict[str, Any]]:
    """Our engine, with all heads or (heads=1) plainly."""
    import torch

    torch.set_num_threads(threads)
    from itertools import cycle

    from nextn.evaluation.roofline import step_cost
    from nextn.evaluation.speed import replaying
    from nextn.formats.native import open_for_decoding

    engine, _ = open_for_decoding(model, heads, dtype)
    fresh: list[str] = []  # what had to be compiled
    if not eager:
        engine.compile(lambda message: _Noted(fresh, message))
    if replay is not None:
        engine.verify, engine.stop_tokens = replaying(engine.verify, cycle(replay)), frozenset()

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        ((_, result),) = engine.generate([prompt], new_tokens)
        return {
            "count": len(result.tokens),
            "tokens": result.tokens,
            "accepted": result.accepted,
            "origins": result.origins,
            "parts": dict(engine.seconds),
        }

    answer([0, 0], 8)
    about = {"compiled": engine.compiled, "fresh": fresh, "padding": engine.padding, "cost": step_cost(engine)}
    return answer, about


class _Noted:
    """A context that notes its message."""

    def __init__(self, notes: list[str], message: str) -> None:
        notes.append(message)

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def transformers(model: str, dtype: str, settings: dict[str, Any], threads: int) -> tuple[Answering, dict[str, Any]]:
    """`model.generate` of transformers; settings: its arguments, such as prompt_lookup_num_tokens or use_mtp."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    host = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        ids = torch.tensor([prompt])
        output = host.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **settings
        )
        tokens = output[0, len(prompt) :].tolist()
        return {"count": len(tokens), "tokens": tokens}

    return answer, {"version": transformers.__version__}


def llama_cpp(gguf: str, threads: int) -> tuple[Answering, dict[str, Any]]:
    """llama.cpp in process (xllamacpp)."""
    from importlib.metadata import version

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = gguf, 2048, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        done = server.handle_completions(
            {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "cache_prompt": False}
        )
        return {"count": done["usage"]["completion_tokens"]}

    return answer, {"version": version("xllamacpp")}


def vllm(model: str, dtype: str, threads: int) -> tuple[Answering, dict[str, Any]]:
    """vLLM on the CPU."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    engine = vllm.LLM(model=model, dtype=dtype, enforce_eager=True, max_model_len=2048, enable_prefix_caching=False)

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=new_tokens)
        (done,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        tokens = list(done.outputs[0].token_ids)
        return {"count": len(tokens), "tokens": tokens}

    return answer, {"version": vllm.__version__}


KINDS: dict[str, Callable[..., tuple[Answering, dict[str, Any]]]] = {
    "nextn": nextn,
    "transformers": transformers,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
}


def main() -> None:
    """Answer until the standard input ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an engine prints goes to the standard error
    specification = json.loads(sys.argv[1])
    answer, about = KINDS[specification.pop("kind")](**specification)

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    say(about)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        given = answer(asked["prompt"], asked["new_tokens"])
        seconds = time.perf_counter() - start
        say({"seconds": seconds, "peak_mib": _peak_mib(), **given})


def _peak_mib() -> float:
    """The most memory this process ever held, in MiB."""
    try:
        with open("/proc/self/status") as status:  # getrusage would count what the parent held when it forked
            return next(int(line.split()[1]) / 2**10 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
