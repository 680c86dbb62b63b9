"""Which tokens drafts can name."""

from __future__ import annotations

import json

import pytest
import torch

from conftest import VOCAB, make_tokenizer
from nextn.data import DataError
from nextn.vocabulary import counted, coverage, foreign_to, listed, most_frequent


def test_the_most_frequent_tokens_are_kept_and_those_that_must():
    counts = torch.bincount(torch.tensor([5, 5, 5, 9, 9, 7, 1]), minlength=VOCAB)
    assert most_frequent(counts, 3, always=[2]).tolist() == [2, 5, 9]
    assert most_frequent(counts, 3, always=[2], never=[5]).tolist() == [1, 2, 9], "ties go to the lower id"
    assert coverage(counts, torch.tensor([5, 9])) == pytest.approx(5 / 7)


def test_tokens_are_counted_where_the_model_answers_and_by_domain(tmp_path):
    tokenizer = make_tokenizer()
    records = [
        {"prompt": "zzz", "answer": "aab", "category": "x"},
        {"prompt": "zzz", "answer": "bcc", "category": "y"},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    a, b, c, z = tokenizer.convert_tokens_to_ids(list("abcz"))
    every = counted([path], tokenizer, VOCAB)
    assert [int(every[token]) for token in (a, b, c, z)] == [2, 2, 2, 0]
    assert [int(counted([path], tokenizer, VOCAB, "y")[token]) for token in (a, b, c)] == [0, 1, 2]
    with pytest.raises(DataError, match="no text of category w"):
        counted([path], tokenizer, VOCAB, "w")


def test_tokens_that_only_the_tokenizer_has_are_not_counted(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>"])
    path = tmp_path / "data.txt"
    path.write_text("ab <call>")
    with pytest.raises(DataError, match=f"gives token {VOCAB}, but the model's vocabulary has {VOCAB}"):
        counted([path], tokenizer, VOCAB)


def test_tokens_of_other_scripts_are_told(tmp_path):
    class Two:
        def __len__(self):
            return 5

        def batch_decode(self, ids):
            return [["the", "кот", "猫", "12 ?", "a猫"][token] for (token,) in ids]

    assert foreign_to(["latin"], Two(), 64) == [1, 2, 4]
    assert foreign_to(["Latin", "CJK"], Two(), 64) == [1]
    with pytest.raises(DataError, match="No token has letters of the script english"):
        foreign_to(["english"], Two(), 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "not a JSON list"), ("{", "not a JSON list"), ("[1.5]", "not a JSON list"), ("[3, 64]", "names token 64")],
)
def test_lists_that_cannot_be_used(text, message, tmp_path):
    (tmp_path / "ids.json").write_text(text)
    with pytest.raises(DataError, match=message):
        listed(tmp_path / "ids.json", VOCAB)
    with pytest.raises(DataError, match="cannot be read"):
        listed(tmp_path / "none.json", VOCAB)


def test_a_list_is_read(tmp_path):
    (tmp_path / "ids.json").write_text("[9, 3, 9]")
    assert listed(tmp_path / "ids.json", VOCAB).tolist() == [3, 9]
