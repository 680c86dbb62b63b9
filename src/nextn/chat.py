"""Apply a tokenizer's chat template, within limits of time, memory and output.

A chat template is a program that comes with a model. jinja's sandbox keeps it away from the system, but lets it run
forever or build a string that fills the memory, and Python cannot stop a rendering that has begun. So templates are
rendered in a process of their own, started once: about 0.7 s, and then a fraction of a millisecond a chat. It is
this file, run as a script; what it renders with is transformers' own method.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SECONDS = 10.0  # for one chat; templates take milliseconds
MEMORY = 2**30  # bytes, beside what the process takes by itself; enforced on Linux
OUTPUT = 2**26  # characters


class ChatTemplateError(ValueError):
    """A chat template that fails on a chat; the message names the template and says why."""


def chat_ids(tokenizer: Any, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> list[int]:
    """A chat as token ids: what `tokenizer.apply_chat_template` gives.

    Args:
        messages: dicts with `role` and `content`.
        add_generation_prompt: end with what begins an answer of the assistant.

    Raises:
        ChatTemplateError: for a template that is no valid one, rejects the chat, or exceeds its limits.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # renders no template
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=True)
        return list(own["input_ids"])
    request = {
        "chat_template": tokenizer.chat_template,
        "special_tokens_map": tokenizer.special_tokens_map,
        "conversation": messages,
        "add_generation_prompt": add_generation_prompt,
        "seconds": SECONDS,
        "output": OUTPUT,
    }
    reply = _renderer.render(request)
    if "text" not in reply:
        raise ChatTemplateError(f"The chat template of {tokenizer.name_or_path or 'the tokenizer'} {reply['error']}.")
    return list(tokenizer(reply["text"], add_special_tokens=False)["input_ids"])


class _Renderer:
    """The process that renders, started when it is first needed and again after a template that it had to stop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock, self._owner = threading.Lock(), 0

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._owner != os.getpid():  # after a fork the pipes, and perhaps a held lock, are the parent's
            self._process, self._lock, self._owner = None, threading.Lock(), os.getpid()
        data = json.dumps(request).encode() + b"\n"
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            with self._killed_on_interrupt(process):  # else the next chat would get this one's reply
                line = _exchange(process, data)
            if line:
                return json.loads(line)
            ended = process.wait()
            atexit.unregister(process.kill)
            late = ended == 1  # as faulthandler ends it
            return {"error": f"did not finish within {request['seconds']:g} s" if late else f"crashed ({ended})"}

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        process = subprocess.Popen(
            # -P: the modules beside this file must not hide others of their names
            [sys.executable, "-P", __file__, str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        with self._killed_on_interrupt(process):
            ready = _exchange(process, b"")
        if not ready:
            process.wait()
            raise ChatTemplateError(f"The process that renders chat templates did not start ({sys.executable}).")
        atexit.register(process.kill)
        return process

    @contextmanager
    def _killed_on_interrupt(self, process: subprocess.Popen[bytes]) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._process = None
            process.kill()
            process.wait()
            atexit.unregister(process.kill)
            raise


def _exchange(process: subprocess.Popen[bytes], data: bytes) -> bytes:
    """Send `data` to a process; returns the next line that it writes, empty where it has ended."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):
        process.stdin.write(data)
        process.stdin.flush()
    return process.stdout.readline()


_renderer = _Renderer()


def main() -> None:
    """Render the chats that come on the standard input, a JSON object a line, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; when it ends, so does the input
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    from transformers import PreTrainedTokenizerBase

    class Template:
        """As much of a tokenizer as its `apply_chat_template` needs."""

        def __init__(self, chat_template: Any, special_tokens_map: dict[str, Any]) -> None:
            self.chat_template, self.special_tokens_map = chat_template, special_tokens_map

        get_chat_template = PreTrainedTokenizerBase.get_chat_template
        apply_chat_template: Any = PreTrainedTokenizerBase.apply_chat_template

    _limit_memory(int(sys.argv[1]))
    with open(os.devnull, "w") as nowhere:
        channel.write(b"ready\n")
        channel.flush()
        for line in sys.stdin.buffer:
            request = json.loads(line)
            seconds, limit = request.pop("seconds"), request.pop("output")
            template = Template(request.pop("chat_template"), request.pop("special_tokens_map"))
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)  # ends the process, whatever it does
            try:
                text = template.apply_chat_template(**request, tokenize=False)
                reply = {"text": text} if len(text) <= limit else {"error": f"gives more than {limit:,} characters"}
                answer = json.dumps(reply).encode()
            except MemoryError:
                answer = json.dumps({"error": f"takes more than {int(sys.argv[1]):,} bytes of memory"}).encode()
            except Exception as error:
                answer = json.dumps({"error": _reason(error)}).encode()
            faulthandler.cancel_dump_traceback_later()
            channel.write(answer + b"\n")
            channel.flush()


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = getattr(error, "lineno", None)
    where = f" in line {line}" if isinstance(line, int) else ""
    return f"fails{where}: {lines[0].rstrip('.')[:500]}"


def _limit_memory(beyond: int) -> None:
    """Bound the memory of this process, where the system has such a bound."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as pages:
            used = int(pages.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + beyond, used + beyond))


if __name__ == "__main__":
    main()
