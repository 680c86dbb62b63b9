"""A file is replaced whole or stays as it was."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from nextn.files import replacing, sha256, write_json


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    for content in ("one", "two"):
        with replacing(path) as part:
            part.write_text(content)
            assert path.exists() == (content == "two")
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_earlier_file_stays_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("earlier")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("hal")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_processes_do_not_write_to_the_same_part(tmp_path, monkeypatch):
    with replacing(tmp_path / "file") as part:
        part.write_text("one")
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with replacing(tmp_path / "file") as other:
            other.write_text("two")
        assert part.read_text() == "one"
    assert (tmp_path / "file").read_text() == "one"


def test_json_and_its_digest(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": [1]})
    assert json.loads(path.read_text()) == {"a": [1]} and path.read_text().endswith("}\n")
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
