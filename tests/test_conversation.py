"""`nextn generate` with chats, files of prompts and conversations: the text is the plain model's."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nextn
from conftest import greedy_reference, make_tokenizer
from nextn.chat import ChatTemplateError, chat_ids
from nextn.cli import app
from nextn.conversation import HELP, Conversation
from nextn.data import DataError
from nextn.formats.native import load_base, load_tokenizer, save

TEMPLATE = (
    "{% for message in messages %}{% if message.content == 'bad' %}{{ raise_exception('Bad.') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}. {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SYSTEM = [{"role": "system", "content": "be kind"}]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def heads(trained_host, tokenizer, tmp_path_factory) -> Path:
    """Heads on a base that reads chats."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("heads")
    trained_host.save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    model = nextn.attach(load_base(str(base)), nextn.MultiTokenConfig(n=4, heads="sequential", recurrent=True))
    save(model, out, load_tokenizer(str(base)))
    return out


@pytest.fixture
def model(heads) -> nextn.MultiTokenModel:
    return nextn.load(heads, dtype=torch.float32).eval()


@pytest.fixture
def answer_of(trained_host, tokenizer):
    """What the plain model answers to a chat."""

    def answer(messages: list[dict], new: int = 10) -> str:
        ids = greedy_reference(trained_host, chat_ids(tokenizer, messages, True), new, stops=(2,))
        return tokenizer.decode(ids, skip_special_tokens=True)

    return answer


def generate(*words: object, lines: str = "", code: int = 0):
    command = ["generate", *map(str, words), "--dtype", "float32"]
    done = CliRunner().invoke(app, command, input=lines, env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert done.exit_code == code, done.output
    return done


@pytest.mark.parametrize("plain", [False, True])
def test_each_turn_is_the_models_own_and_reads_only_what_is_new(model, tokenizer, answer_of, plain):
    read: list[int] = []
    model.base.model.layers[0].register_forward_pre_hook(lambda _module, args: read.append(args[0].shape[1]))
    conversation = Conversation(model.engine(heads=1 if plain else None, keep=True), tokenizer, "be kind", 10)
    messages, shown = list(SYSTEM), []
    for text in ("hi", "who", "why"):
        messages.append(user(text))
        read.clear()
        shown.clear()
        result = conversation.say(text, shown.append)
        expected = answer_of(messages)
        assert "".join(shown) == expected
        messages.append({"role": "assistant", "content": expected})
        assert conversation.messages == messages
        if text != "hi":
            assert read[0] < len(result.prompt) - 20
    conversation.reset()
    assert conversation.messages == SYSTEM and conversation.figures() == "There is no answer yet."


def test_ctrl_c_ends_an_answer_and_not_the_conversation(model, tokenizer, answer_of):
    conversation = Conversation(model.engine(keep=True, depth=0), tokenizer, max_new_tokens=10)
    shown: list[str] = []

    def show(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = conversation.say("hi", show)
    assert result.finish == "cancelled" and 3 <= len(result.tokens) < 10
    assert answer_of([user("hi")]).startswith("".join(shown)) and signal.getsignal(signal.SIGINT) is before
    messages = [*conversation.messages, user("who")]
    assert messages[1] == {"role": "assistant", "content": "".join(shown)}
    conversation.say("who", lambda _: None)
    assert conversation.messages[-1]["content"] == answer_of(messages)


def test_what_cannot_be_read_leaves_the_conversation_as_it_was(model, tokenizer):
    conversation = Conversation(model.engine(keep=True), tokenizer)
    for text, error in (("bad", ChatTemplateError), (" ", DataError)):
        with pytest.raises(error):
            conversation.say(text, print)
    assert conversation.messages == [] == conversation.results
    with pytest.raises(ValueError, match="make it with keep=True"):
        Conversation(model.engine(), tokenizer)


def test_a_conversation_in_the_terminal(heads, answer_of):
    lines = "hi\n/stats\n\nbad\n/what\n/reset\n/stats\nhi\n/exit\nnever\n"
    done = generate(heads, "--chat", "--max-new-tokens", 10, lines=lines)
    assert done.stdout == 2 * (answer_of([user("hi")]) + "\n")
    assert done.stderr.count(HELP) == 2 and "There is no answer yet." in done.stderr and "Bad" in done.stderr
    (stats,) = (line for line in done.stderr.splitlines() if line.startswith("last answer:"))
    assert "tokens, τ" in stats and "conversation:" in stats
    again = generate(heads, "--chat", "--heads", 1, "--max-new-tokens", 10, "--system", "be kind", lines="hi\n")
    assert again.stdout == answer_of([*SYSTEM, user("hi")]) + "\n"


def test_a_system_message_and_a_chat_from_a_file(heads, answer_of, tmp_path):
    chat = [*SYSTEM, user("hi"), {"role": "assistant", "content": "yes"}, user("who")]
    for content in (chat, {"messages": chat}):
        (tmp_path / "chat.json").write_text(json.dumps(content))
        done = generate(heads, "--messages", tmp_path / "chat.json", "--max-new-tokens", 10)
        assert done.stdout == answer_of(chat) + "\n"
    done = generate(heads, "hi", "--system", "be kind", "--max-new-tokens", 10)
    assert done.stdout == answer_of([*SYSTEM, user("hi")]) + "\n"


@pytest.fixture
def questions(tmp_path) -> list[dict]:
    records = [{"prompt": "abcdefgh"[:n], "n": n} for n in range(1, 8)]
    records.append({"messages": [user("hi"), {"role": "assistant", "content": "yes"}, user("who")], "n": 8})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


@pytest.mark.parametrize("options", [(), ("--heads", 1)])
def test_a_file_of_prompts_is_answered_as_each_alone(heads, answer_of, questions, tmp_path, options):
    words = ("--prompts", tmp_path / "questions.jsonl", "--out", tmp_path / "out.jsonl", "--max-new-tokens", 10)
    done = generate(heads, *words, *options, "--system", "be kind", "--rows", 3)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(record["n"] for record in answers) == list(range(1, 9)) and "τ" in done.stderr
    for record in answers:
        messages = record.get("messages") or [user(record["prompt"])]
        assert record["answer"] == answer_of([*SYSTEM, *messages]) and record["system"] == "be kind"
        assert record["finish"] in ("stop", "length") and record["tokens"]


def test_a_cut_run_goes_on_to_the_same_texts(heads, questions, tmp_path):
    words = ("--prompts", tmp_path / "questions.jsonl", "--max-new-tokens", 10, "--temperature", 1.5, "--seed", 3)
    generate(heads, *words, "--out", tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert len({json.loads(line)["answer"] for line in lines}) > 4
    (tmp_path / "cut.jsonl").write_text("\n".join(lines[4:6]) + '\n{"prompt": "ab')
    generate(heads, *words, "--out", tmp_path / "cut.jsonl", "--rows", 2)
    assert sorted((tmp_path / "cut.jsonl").read_text().splitlines()) == sorted(lines)
    (tmp_path / "questions.jsonl").write_text('{"prompt": "ab"}\n' * 4)
    generate(heads, *words, "--out", tmp_path / "same.jsonl")
    answers = [json.loads(line)["answer"] for line in (tmp_path / "same.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and len(set(answers)) > 1, "each record has a seed of its own"
    done = generate(heads, *words, "--out", tmp_path / "same.jsonl")
    assert "answers all 4 prompts: nothing is changed" in done.stdout


def test_bad_input_gets_one_sentence(heads, tiny_heads, questions, tmp_path):
    write = {
        "none.jsonl": '{"text": "a"}\n',
        "words.json": "hello",
        "empty.json": "[]",
        "ended.json": json.dumps([user("hi"), {"role": "assistant", "content": "yes"}]),
        "system.json": json.dumps([*SYSTEM, user("hi")]),
    }
    for name, content in write.items():
        (tmp_path / name).write_text(content)
    out = ("--out", tmp_path / "out.jsonl")
    for words, says in (
        ((heads,), "Give one of a prompt, --messages, --prompts and --chat, not none."),
        ((heads, "hi", "--chat"), "not a prompt and --chat."),
        ((heads, "hi", *out), "--out goes with --prompts"),
        ((heads, "--chat", "--rows", 2), "--rows goes with --prompts"),
        ((heads, "--prompts", tmp_path / "questions.jsonl"), "--prompts needs --out"),
        ((heads, "--prompts", tmp_path / "none.jsonl", *out), "record 1, has neither a `prompt` nor `messages`."),
        ((heads, "--messages", tmp_path / "nowhere.json"), "cannot be read"),
        ((heads, "--messages", tmp_path / "words.json"), "is not JSON"),
        ((heads, "--messages", tmp_path / "empty.json"), "holds no chat"),
        ((heads, "--messages", tmp_path / "ended.json"), "The chat ends with the assistant"),
        ((heads, "--messages", tmp_path / "system.json", "--system", "x"), "has a system message of its own"),
        ((tiny_heads, "--chat"), "has no chat template"),
        ((tiny_heads, "hi", "--system", "be kind"), "has no chat template"),
    ):
        done = generate(*words, code=1)
        said = [line for line in done.output.splitlines() if line.startswith("nextn:")]
        assert len(said) == 1 and says in said[0] and said[0].endswith("."), done.output
