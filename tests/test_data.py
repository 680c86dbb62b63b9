"""Packing loses nothing but what it says, and documents keep their borders."""

from __future__ import annotations

import csv
import itertools
import json
import sys

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tokenizer
from nextn.data import (
    IGNORE,
    DataError,
    PackedBlocks,
    StreamedBlocks,
    TextStream,
    byte_tokenizer,
    example,
    examples_of,
    read_jsonl,
    records_of,
)
from nextn.distill import encoded
from nextn.vocabulary import counted

documents = st.lists(
    st.lists(st.integers(3, 60), min_size=1, max_size=30).map(lambda ids: (ids, [IGNORE, *ids[1:]])),
    min_size=1,
    max_size=40,
)


@given(documents, st.integers(2, 40))
def test_packed_blocks_hold_every_document_once(examples, length):
    trainable = [(ids[:length], labels[:length]) for ids, labels in examples if len(ids) > 1]
    if not trainable:
        with pytest.raises(DataError, match=r"no usable text|nothing to predict"):
            PackedBlocks(examples, length, pad_id=0)
        return
    blocks = PackedBlocks(examples, length, pad_id=0)
    found = []
    for place in range(len(blocks)):
        block = blocks[place]
        assert all(tensor.shape == (length,) for tensor in block.values())
        used = int(block["attention_mask"].sum())
        assert (block["labels"][used:] == IGNORE).all()
        borders = [*(block["position_ids"][:used] == 0).nonzero().flatten().tolist(), used]
        for start, end in itertools.pairwise(borders):
            assert torch.equal(block["position_ids"][start:end], torch.arange(end - start))
            found.append((block["input_ids"][start:end].tolist(), block["labels"][start:end].tolist()))
    assert sorted(found) == sorted(trainable)
    assert blocks.trained_tokens == sum(len(ids) - 1 for ids, _ in trainable)


def test_answers_are_trained_on_and_prompts_are_not():
    tokenizer = make_tokenizer()
    ids, labels = example(tokenizer, {"prompt": "ab", "answer": "cd", "finish": "stop"})
    assert tokenizer.decode(ids) == "abcd<eos>"
    assert labels == [IGNORE, IGNORE, *ids[2:]]
    ids, labels = example(tokenizer, {"prompt": "ab", "answer": "cd", "finish": "length"})
    assert tokenizer.decode(ids) == "abcd", "an answer that was cut has no end token"
    ids, labels = example(tokenizer, {"text": "abc"})
    assert labels == [IGNORE, *ids[1:]], "nothing predicts a text's first token"
    exact = {"prompt": "ab", "answer": "cd", "tokens": [*tokenizer("cd")["input_ids"], 1], "finish": "stop"}
    assert example(tokenizer, exact)[0][-1] == 1, "the end token that the model emitted, not the tokenizer's"
    for other in ([9, 9], [64], [-1], 57, "cd", None, []):  # another tokenizer's, or no ids at all
        assert example(tokenizer, exact | {"tokens": other})[0][-1] == 2
    assert example(tokenizer, {"text": "  "}) is None
    assert example(tokenizer, {"prompt": "ab", "answer": ""}) is None


def test_an_answer_to_a_chat_is_trained_on_alone():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }}:{{ message.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": "c"}]
    for asked, head in (
        ({"messages": chat}, "user:ab<eos>assistant:no<eos>user:c<eos>assistant:"),
        ({"prompt": "ab", "system": "x"}, "system:x<eos>user:ab<eos>assistant:"),
        ({"prompt": "ab", "system": None}, "user:ab<eos>assistant:"),
    ):
        for finish, end in (("stop", "<eos>"), ("length", "")):
            ids, labels = example(tokenizer, asked | {"answer": "cd", "finish": finish})
            assert tokenizer.decode(ids) == f"{head}cd{end}"
            assert tokenizer.decode([label for label in labels if label != IGNORE]) == f"cd{end}"
    whole = [*chat, {"role": "assistant", "content": "yes"}]
    assert example(tokenizer, {"messages": whole, "answer": "cd"}) == example(tokenizer, {"messages": whole})


@pytest.mark.parametrize(
    "content, says",
    [("hello\n", "line 1, is not JSON"), ('{"a": 1}\n[1]\n', "line 2, is no JSON object"), ("", "no rec")],
)
def test_bad_files_get_a_sentence(tmp_path, content, says):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(DataError, match=says):
        read_jsonl(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="no data file"):
        read_jsonl(tmp_path / "nowhere.jsonl")


def test_a_character_of_several_tokens_is_shown_whole():
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({byte: place for place, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer("né 日!")["input_ids"]]
    assert "".join(pieces) == "né 日!"
    assert pieces == ["n", "", "é", " ", "", "", "日", "!"]


def streamed(tokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join(stream.push(token) for token in ids) + stream.flush()


def test_a_character_that_is_cut_is_shown_as_decode_shows_it():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a 😀")["input_ids"]
    assert [streamed(tokenizer, ids[:length]) for length in range(1, 7)] == ["a", "a ", *["a \ufffd"] * 3, "a 😀"]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in [*ids[:4], tokenizer.eos_token_id]] == ["a", " ", "", "", ""]
    assert stream.flush() == "\ufffd" and stream.flush() == ""


def sentencepiece_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Spaces as letters, the first of which a text loses, and bytes where letters are missing: as Llama 2's."""
    letters = ["▁", "▁a", "b", "▁▁", "\n", "é"]
    vocabulary = {token: place for place, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
         tokenizers.decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


PARTS_OF_TEXT = st.text(st.sampled_from("aé日😀 \n"), max_size=6).map(lambda text: list(text.encode()))


@given(st.lists(st.one_of(PARTS_OF_TEXT, st.lists(st.integers(0, 257), max_size=6)), max_size=5))
def test_streamed_text_is_the_decoded_text_for_any_tokens(parts):
    tokenizer, ids = byte_tokenizer(), [token for part in parts for token in part]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)


@given(st.lists(st.one_of(PARTS_OF_TEXT, st.lists(st.integers(256, 263), max_size=6)), max_size=5))
def test_streamed_text_keeps_its_spaces_where_a_decoder_strips_the_first(parts):
    tokenizer, ids = sentencepiece_tokenizer(), [token for part in parts for token in part]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)
    cut = tokenizer.decode([*ids, 258], skip_special_tokens=True)
    assert streamed(tokenizer, [*ids, 258, 0xE6, 0x97]) == cut + "\ufffd" * 2


def test_prompts_without_text_are_refused(tmp_path):
    from nextn.data import read_prompts

    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": ""}) + "\n")
    with pytest.raises(DataError, match="no record with a `prompt`"):
        read_prompts(tmp_path / "p.jsonl")


@given(st.text())
def test_the_byte_tokenizer_reads_and_writes_any_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) and len(tokenizer) == 258
    assert tokenizer.decode(ids) == text


def test_the_byte_tokenizer_is_an_ordinary_one(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("né")["input_ids"] == list("né".encode())
    assert (loaded.eos_token_id, loaded.pad_token_id) == (256, 257)


def test_sources_of_every_kind_give_their_records(tmp_path):
    texts = ["one two", "three"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "c.txt").write_text("one two\nthree\n")
    (tmp_path / "e.csv").write_text("text,n\none two,1\nthree,2\n")
    (tmp_path / "f.tsv").write_text("text\tn\none two\t1\nthree\t2\n")
    for name in ("a.jsonl", "e.csv", "f.tsv"):
        assert [record["text"] for record in records_of(tmp_path / name)] == texts
    pieces = [record["text"] for record in records_of(tmp_path / "c.txt", text_bytes=3)]
    assert pieces == ["one two\n", "three\n"]
    for missing in (tmp_path / "none.jsonl", "none.jsonl"):
        with pytest.raises(DataError, match="There is no data file"):
            list(records_of(missing))


def test_parquet_needs_pyarrow_alone(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"text": str(n), "messages": [{"role": "user", "content": "a"}]} for n in range(1500)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert list(records_of(tmp_path / "b.parquet")) == records
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"d.parquet cannot be read"):
        list(records_of(tmp_path / "d.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"b.parquet is read by pyarrow: pip install 'nextn\[parquet\]'\."):
        list(records_of(tmp_path / "b.parquet"))


def test_csv_gives_what_json_lines_give(tmp_path):
    """With quotes, line ends and a byte order mark, a text longer than csv's own limit, a chat and an empty cell."""
    chat = [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": '"é"\n'}]
    records = [
        {"text": 'one, two\r\n"three"\n' + "x" * 200_000},
        {"prompt": "ab", "answer": "cd", "finish": "length"},
        {"prompt": "ab", "answer": "cd"},
        {"messages": chat},
    ]
    with (tmp_path / "data.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["text", "prompt", "answer", "finish", "messages"])
        table.writeheader()
        table.writerows(records[:3])
        table.writerow({"messages": json.dumps(chat)})
    assert list(records_of(tmp_path / "data.csv")) == records


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "has the columns .none.; expected text, prompt and answer, or messages"),
        ("one two\nthree\n", "has the columns one two; expected text"),
        ("text\na, b\n", "line 2, has more cells than there are columns"),
        ('text\n"a\n', "cannot be read"),
        ("messages\nhello\n", "line 2, cannot be read: Expecting value"),
    ],
)
def test_a_bad_table_gets_a_sentence(tmp_path, content, says):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(DataError, match=rf"data.csv.* {says}.*\.$"):
        list(records_of(tmp_path / "data.csv"))


def test_a_text_longer_than_a_block_comes_in_pieces_and_an_answer_does_not(tmp_path):
    records = [{"text": "abcdefg"}, {"prompt": "ab", "answer": "cdefg"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    made = list(examples_of([tmp_path / "a.jsonl"], make_tokenizer(), 3))
    assert [len(ids) for ids, _ in made] == [3, 3, 1, 8]
    assert all(labels[0] == IGNORE and labels[1:] == ids[1:] for ids, labels in made[:3])


def test_streamed_blocks_are_the_packed_ones():
    examples = [([5] * length, [IGNORE, *[5] * (length - 1)]) for length in (3, 9, 4, 7, 2, 12, 5)]
    packed, streamed = PackedBlocks(examples, 12, 0), StreamedBlocks(lambda: examples, 12, 0)
    for _ in range(2):
        for ours, theirs in zip(streamed, (packed[place] for place in range(len(packed))), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_chat_trains_on_what_the_assistant_says():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "no"), ("user", "ok")]
    ids, labels = example(tokenizer, {"messages": [{"role": role, "content": text} for role, text in turns]})
    assert tokenizer.decode(ids) == "u:hia:yo<eos>u:soa:no<eos>"
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == "yo<eos>no<eos>"
    assert all(label in (IGNORE, id) for id, label in zip(ids, labels, strict=True))
    assert example(tokenizer, {"messages": [{"role": "user", "content": "hi"}]}) is None
    with pytest.raises(DataError, match="no chat template"):
        example(make_tokenizer(), {"messages": []})


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}<e>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
# As Mistral's: roles take turns, or the template raises.
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant.') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content.strip() }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def chatting(template: str, tokenizer=None):
    """A tokenizer whose turns end with <e>, which is not its end token."""
    tokenizer = tokenizer or byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<s>", "<e>"]})
    tokenizer.chat_template = template
    return tokenizer


def trained_on(tokenizer, record) -> tuple[str, str]:
    ids, labels = example(tokenizer, record)
    assert all(label in (IGNORE, id) for id, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORE])


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
ANSWER = {"prompt": "hi", "answer": "yo"}


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<e>"),  # and a newline, which the model does not emit
        (CHATML.replace("<e>\n", "<e>"), "<e>"),
        (CHATML.replace("<e>\n", "<e><eos>\n\n"), "<e>"),
        (CHATML.replace("<e>\n", "<eos>"), "<eos>"),
        (STRICT, "<eos>"),
        (CHATML.replace("m.content", "m.content | trim"), "<e>"),
    ],
)
def test_answers_and_chats_end_as_the_template_ends_a_turn(template, end):
    tokenizer = chatting(template)
    assert trained_on(tokenizer, CHAT) == trained_on(tokenizer, ANSWER)
    assert trained_on(tokenizer, CHAT)[1] == f"yo{end}"
    assert trained_on(tokenizer, ANSWER | {"finish": "length"})[1] == "yo"
    emitted = [*tokenizer("yo")["input_ids"], *tokenizer(end)["input_ids"]]
    assert trained_on(tokenizer, ANSWER | {"finish": "stop", "tokens": emitted})[1] == f"yo{end}"


def test_an_inner_turn_of_a_chat_ends_as_the_last_one():
    again = {"messages": CHAT["messages"] * 2}
    text, labels = trained_on(chatting(CHATML), again)
    assert labels == "yo<e>yo<e>" and text.endswith("yo<e>") and "yo<e>\n<s>user" in text


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}\n{% endfor %}", "no messages"])
def test_where_no_template_says_how_a_turn_ends_the_end_token_does(template):
    tokenizer = chatting(template)
    assert trained_on(tokenizer, ANSWER)[1] == "yo<eos>"
    tokenizer.eos_token = None
    assert trained_on(tokenizer, ANSWER)[1] == "yo"


def test_a_chat_that_the_assistant_begins_trains_on_what_it_answers():
    greeting = [{"role": "assistant", "content": "hello"}]
    text, labels = trained_on(chatting(CHATML), {"messages": greeting + CHAT["messages"]})
    assert text.startswith("<s>assistant:hello<e>") and labels == "yo<e>"
    assert example(chatting(CHATML), {"messages": greeting}) is None
    assert example(chatting(CHATML), {"messages": []}) is None


TURN = {"role": "user", "content": "hi"}
MALFORMED = {
    "the assistant begins": ([{"role": "assistant", "content": "hello"}, *CHAT["messages"]], "must alternate"),
    "the system twice": ([{"role": "system", "content": "a"}] * 2 + CHAT["messages"], "must alternate"),
    "an unknown role": ([{"role": "human", "content": "hi"}], "message 1 has the role 'human'; expected one of system"),
    "no role": ([TURN, {"from": "gpt", "value": "yo"}], "message 2 has no role"),
    "a text in place of a message": (["hi"], "message 1 has no role"),
    "a number": ([TURN, {"role": "assistant", "content": 5}], "the content of message 2 is no text"),
    "an image": ([{"role": "user", "content": [{"type": "image"}]}], "the content of message 1 is no text"),
    "nothing": ([{"role": "user"}], "the content of message 1 is no text"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_chat_is_named_by_file_and_record(name, tmp_path):
    messages, says = MALFORMED[name]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (CHAT, {"messages": messages})))
    for read in (
        lambda: list(examples_of([path], chatting(STRICT), 64)),
        lambda: counted([path], chatting(STRICT), 260),
    ):
        with pytest.raises(DataError, match=f"^{path}, record 2: .*{says}.*[.]$"):
            read()


def test_a_role_that_the_template_names_and_calls_of_tools_are_read(tmp_path):
    template = CHATML + "{# observation #}"
    messages = [TURN, {"role": "assistant", "content": None, "tool_calls": [{"name": "x"}]}]
    messages += [{"role": "observation", "content": "5"}, {"role": "assistant", "content": "yo"}]
    assert trained_on(chatting(template), {"messages": messages})[1].endswith("yo<e>")


def test_parts_of_text_are_one_text():
    parts = [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]
    chat = {"messages": [TURN, {"role": "assistant", "content": parts}]}
    assert trained_on(chatting(CHATML), chat) == trained_on(chatting(CHATML), CHAT)


def test_text_that_no_tokenizer_reads_is_named_too(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, record 2: "):
        list(examples_of([tmp_path / "a.jsonl"], byte_tokenizer(), 64))
    with pytest.raises(DataError, match=r"The prompt '\\ud83d': "):
        encoded(byte_tokenizer(), [{"prompt": "\ud83d"}], 64)
