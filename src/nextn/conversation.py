"""A conversation with a model, in which each turn is read from where the one before ended."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nextn.data import DataError, TextStream, answerable_ids
from nextn.decoding.engine import Engine
from nextn.decoding.rows import Generation
from nextn.decoding.sampling import GREEDY, Sampling
from nextn.evaluation.acceptance import Acceptance

HELP = "/stats: tokens per forward, /reset: begin anew, /exit or Ctrl-D: end, Ctrl-C: stop an answer"

Show = Callable[[str], None]


class Conversation:
    """A chat of a user and a model.

    Args:
        engine: with `keep`, so that only what is new is read in each turn.
        system: a system message to begin with.
        max_new_tokens: the longest answer.

    Attributes:
        messages: all that was said, as the chat template gets it.
        results: the model's answers.

    Raises:
        ValueError: for an engine that would read all of the chat in each turn.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        system: str | None = None,
        max_new_tokens: int = 1024,
        sampling: Sampling = GREEDY,
    ) -> None:
        if not engine.keep:
            raise ValueError("A conversation needs an engine that keeps what it read: make it with keep=True.")
        self.engine, self.tokenizer, self.system = engine, tokenizer, system
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.results: list[Generation] = []

    def say(self, text: str, show: Show) -> Generation:
        """Answer what the user says. Ctrl-C ends the answer; what it has so far is kept.

        Args:
            show: called with pieces of the answer as they come.

        Raises:
            DataError, ChatTemplateError, PromptError: for a chat that cannot be read. It is then as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids, stream = answerable_ids(self.tokenizer, messages), TextStream(self.tokenizer)

        def push(_index: int, tokens: list[int], _origins: list[int]) -> None:
            show("".join(stream.push(token) for token in tokens))

        with _on_interrupt(lambda: self.engine.cancel(0)):
            ((_, result),) = self.engine.generate([ids], self.max_new_tokens, push, self.sampling)
        show(stream.flush())
        if result.error is not None:
            raise DataError(str(result.error))
        answer = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.results.append(result)
        return result

    def figures(self) -> str:
        """Tokens and τ of the last answer and of the conversation."""
        if not self.results:
            return "There is no answer yet."
        parts = {"last answer": self.results[-1:], "conversation": self.results}
        return "; ".join(
            f"{name}: {sum(len(result.tokens) for result in results)} tokens, "
            f"τ {Acceptance.of(results, self.engine.n).tau:.2f}"
            for name, results in parts.items()
        )


def converse(conversation: Conversation, ask: Callable[[], str], show: Show, note: Show) -> None:
    """Hold a conversation until the user ends it.

    Args:
        ask: gives what the user says next; raises EOFError at the end.
        show: is given the answers, piece by piece.
        note: is given all else.
    """
    note(HELP)
    while True:
        try:
            text = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/stats":
            note(conversation.figures())
        elif text == "/reset":
            conversation.reset()
        elif re.fullmatch(r"/\w*", text):
            note(HELP)
        elif text:
            try:
                conversation.say(text, show)
                show("\n")
            except ValueError as error:  # such as a chat that has become too long
                note(str(error))


@contextmanager
def _on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """Call a function when Ctrl-C is pressed: an exception in the middle of a step would leave half of one."""
    if threading.current_thread() is not threading.main_thread():  # which alone has signals
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
