"""Those who are measured, each in a process of its own that answers prompts from its standard input.

    python contenders.py '{"kind": "llama.cpp", "gguf": "model.gguf", "threads": 2}'

One line of JSON comes in, {"prompt": [token ids], "new_tokens": 128}, and one goes out; before that, what the contender
does while it starts ({"doing": "compiling ..."}) and what it is. A process each keeps memory apart, and lets an engine
live in an environment of its own: this file imports nextn only for the contenders that are nextn. All decode greedily,
batch 1, and all are timed from the prompt's token ids to the last new token. With `endless` they ignore end tokens.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Asked = dict[str, Any]  # `prompt` and `new_tokens`; for our engine also `replay`, how many drafts are to stand
# An answer has `count` of new tokens, and where the engine gives them `tokens`, `accepted`, `origins` and `parts`.
Answer = dict[str, Any]
Answering = Callable[[Asked], Answer]
Say = Callable[[dict[str, Any]], None]


def nextn(
    say: Say,
    model: str,
    dtype: str,
    heads: int | None,
    eager: bool,
    endless: bool,
    threads: int,
    trust_remote_code: bool,
) -> tuple[Answering, dict[str, Any]]:
    """Our engine, with all heads or (heads=1) plainly."""
    from itertools import cycle

    import torch

    from nextn.evaluation.replay import replaying
    from nextn.evaluation.roofline import step_cost
    from nextn.formats.native import open_for_decoding

    torch.set_num_threads(threads)
    engine, _ = open_for_decoding(model, heads, dtype, trust_remote_code=trust_remote_code)
    engine.stop_tokens = frozenset() if endless else engine.stop_tokens
    compiled_here = []

    @contextmanager
    def compiling(message: str) -> Iterator[None]:
        compiled_here.append(message)
        say({"doing": message})
        yield

    if not eager:
        engine.compile(compiling)
    verify = engine.verify

    def answer(asked: Asked) -> Answer:
        replay = asked.get("replay")
        engine.verify = verify if replay is None else replaying(verify, cycle(replay))
        ((_, result),) = engine.generate([asked["prompt"]], asked["new_tokens"])
        return {
            "count": len(result.tokens),
            "tokens": result.tokens,
            "accepted": result.accepted,
            "drafted": result.drafted,
            "origins": result.origins,
            "parts": dict(engine.seconds),
        }

    answer({"prompt": [0, 0], "new_tokens": 8})
    about = {"compiled": engine.code is not None, "why_eager": engine.why_eager, "padding": engine.padding,
             "cost": step_cost(engine), "compiled_here": bool(compiled_here and engine.code)}  # fmt: skip
    return answer, about


def transformers(
    say: Say,
    model: str,
    dtype: str,
    settings: dict[str, Any],
    endless: bool,
    threads: int,
    trust_remote_code: bool,
) -> tuple[Answering, dict[str, Any]]:
    """`model.generate` of transformers; settings: its arguments, such as prompt_lookup_num_tokens or use_mtp."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    host = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=trust_remote_code
    ).eval()

    def answer(asked: Asked) -> Answer:
        ids, new = torch.tensor([asked["prompt"]]), asked["new_tokens"]
        least = {"min_new_tokens": new} if endless else {}
        output = host.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **least, **settings
        )
        tokens = output[0, ids.shape[1] :].tolist()
        return {"count": len(tokens), "tokens": tokens}

    return answer, {"version": transformers.__version__}


def llama_cpp(say: Say, gguf: str, context: int, endless: bool, threads: int) -> tuple[Answering, dict[str, Any]]:
    """llama.cpp in process (xllamacpp)."""
    from importlib.metadata import version

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = gguf, context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def answer(asked: Asked) -> Answer:
        done = server.handle_completions(
            {"prompt": asked["prompt"], "max_tokens": asked["new_tokens"], "temperature": 0, "cache_prompt": False,
             "ignore_eos": endless}
        )  # fmt: skip
        return {"count": done["usage"]["completion_tokens"]}

    return answer, {"version": version("xllamacpp")}


def vllm(
    say: Say, model: str, dtype: str, context: int, endless: bool, threads: int, trust_remote_code: bool
) -> tuple[Answering, dict[str, Any]]:
    """vLLM on the CPU."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    import vllm

    engine = vllm.LLM(
        model=model,
        dtype=dtype,
        load_format="safetensors",
        trust_remote_code=trust_remote_code,
        enforce_eager=True,
        max_model_len=context,
        enable_prefix_caching=False,
    )

    def answer(asked: Asked) -> Answer:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=endless)
        (done,) = engine.generate([{"prompt_token_ids": asked["prompt"]}], sampling, use_tqdm=False)
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

    def say(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    specification = json.loads(sys.argv[1])
    answer, about = KINDS[specification.pop("kind")](say, **specification)
    say(about)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        given = answer(asked)
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
