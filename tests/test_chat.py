from __future__ import annotations

import os
import subprocess
import types

import pytest

from conftest import make_tokenizer
from nextn import chat
from nextn.chat import ChatTemplateError, chat_ids
from nextn.data import DataError, example, prompt_ids

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}:{{ message.content | default('none') | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CHATS = [
    [{"role": "user", "content": " hi there "}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "🙂 “é” {{ 1 }}"}],
]


@pytest.fixture
def tokenizer():
    made = make_tokenizer()
    made.name_or_path = "owner/model"
    return made


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("template", [TEMPLATE, {"default": TEMPLATE, "tool_use": "{{ 1 }}"}])
def test_chats_become_what_transformers_makes_of_them(tokenizer, template, prompted):
    tokenizer.chat_template = template
    for messages in CHATS:
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompted)["input_ids"]
        assert chat_ids(tokenizer, messages, add_generation_prompt=prompted) == expected


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (ENDLESS, "did not finish within 1 s"),
        (DOUBLING, "within 1 s|bytes of memory"),
        ("{{ 'x' * 5000000000 }}", "within 1 s|bytes of memory"),
        ("{{ 'x' * 2000 }}", "gives more than 1,000 characters"),
        ("{% if %}", "fails in line 1: Expected an expression"),
        ("{{ raise_exception('Roles must alternate.') }}", r"fails: Roles must alternate\.$"),
        ("{{ messages[0].nope.more }}", "has no attribute 'nope'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_bad_template_is_one_sentence_and_the_next_one_works(tokenizer, template, says, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1.0)
    monkeypatch.setattr(chat, "OUTPUT", 1000)
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=says) as caught:
        chat_ids(tokenizer, CHATS[0])
    assert str(caught.value).startswith("The chat template of owner/model ") and "\n" not in str(caught.value)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert chat_ids(tokenizer, [{"role": "user", "content": "ab"}]) == tokenizer("ab")["input_ids"]


def test_prompts_and_chats_of_records_go_through_the_limits(tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "OUTPUT", 10)
    tokenizer.chat_template = "{{ 'x' * 11 }}"
    with pytest.raises(ChatTemplateError):
        prompt_ids(tokenizer, "hi")
    with pytest.raises((ChatTemplateError, DataError)):
        example(tokenizer, {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_renders_with_a_process_of_its_own(tokenizer):
    tokenizer.chat_template = TEMPLATE
    expected = chat_ids(tokenizer, CHATS[0])
    parents, (read, write) = chat._renderer._process, os.pipe()
    if (child := os.fork()) == 0:
        right = chat_ids(tokenizer, CHATS[0]) == expected and chat._renderer._process is not parents
        os.write(write, b"1" if right else b"0")
        chat._renderer._process.kill()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1) == b"1"
    assert chat_ids(tokenizer, CHATS[0]) == expected and chat._renderer._process is parents


class Interrupted:
    """The output of a process during whose reading the user presses Ctrl-C."""

    def readline(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("stream", ["stdout", "stdin"])
def test_an_interrupted_chat_does_not_become_the_reply_to_the_next_one(tokenizer, monkeypatch, stream):
    tokenizer.chat_template = "{{ messages[0].content }}"
    chat_ids(tokenizer, [{"role": "user", "content": "a"}])
    process = chat._renderer._process
    if stream == "stdout":
        monkeypatch.setattr(process, "stdout", Interrupted())
    else:  # after half a line was written

        def write(data: bytes, real=process.stdin.write):
            real(data[:10])
            raise KeyboardInterrupt

        monkeypatch.setattr(process, "stdin", types.SimpleNamespace(write=write, flush=process.stdin.flush))
    with pytest.raises(KeyboardInterrupt):
        chat_ids(tokenizer, [{"role": "user", "content": "b"}])
    monkeypatch.undo()
    assert chat_ids(tokenizer, [{"role": "user", "content": "c"}]) == tokenizer("c")["input_ids"]
    assert process.wait(10) is not None


def test_an_interrupt_while_the_renderer_starts_ends_its_process(monkeypatch):
    started = []

    def start(*args, real=subprocess.Popen, **options):
        started.append(real(*args, **options))
        real_stdout, started[0].stdout = started[0].stdout, Interrupted()
        started.append(real_stdout)
        return started[0]

    monkeypatch.setattr(chat.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        chat._Renderer().render({})
    assert started[0].poll() is not None
