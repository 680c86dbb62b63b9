"""A report takes the place of an earlier report, and of nothing else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from nextn.evaluation.report import PAGE_TITLE, check_report, write_report
from nextn.formats import FormatError

REPORT = {"machine": {"threads": 2}, "tau": 2.0}
PAGE = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{PAGE_TITLE}m</title></html>'


@pytest.mark.parametrize(
    "content",
    [bytes(range(256)), b"a text\n", b"{}", b'{"name": "package"}', b'{"machine": "x"}', b"[1]", b"<!doctype html><p>"],
)
def test_what_is_no_report_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    for refused in (lambda: check_report(path), lambda: write_report(path, REPORT), lambda: write_report(path, PAGE)):
        with pytest.raises(FormatError, match="no report that nextn wrote"):
            refused()
    assert path.read_bytes() == content


def test_directories_and_what_lies_in_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="is a directory"):
        check_report(tmp_path)
    with pytest.raises(FormatError, match="cannot be written to"):
        check_report(tmp_path / "file" / "report.json")
    check_report(None)
    write_report(None, REPORT)


@pytest.mark.parametrize("report", [REPORT, PAGE], ids=["figures", "page"])
def test_a_report_is_written_anew_through_a_link(tmp_path, report):
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "report")
    for path in (tmp_path / "empty", tmp_path / "report", tmp_path / "link"):
        for _ in range(2):
            check_report(path)
            write_report(path, report)
        assert "machine" in path.read_text() or path.read_text() == PAGE
    assert sorted(file.name for file in tmp_path.iterdir()) == ["empty", "link", "report"]
    assert (tmp_path / "link").is_symlink()


def test_an_earlier_report_stays_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_report(path, REPORT)
    before = path.read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_report(path, REPORT | {"tau": 3.0})
    assert path.read_text() == before and [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_takes_a_report(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    thread.start()
    check_report(tmp_path / "pipe")
    write_report(tmp_path / "pipe", PAGE)
    thread.join()
    assert read == [PAGE]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_devices_and_pipes_are_accepted_in_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "report").touch()
    read, write = os.pipe()  # as process substitution passes it
    monkeypatch.setattr(os, "access", lambda *_: False)
    for path in (tmp_path / "pipe", Path("/dev/null"), Path(f"/dev/fd/{write}")):
        if path.exists():
            check_report(path)
    os.close(read)
    os.close(write)
    for path in (tmp_path / "report", tmp_path / "missing"):
        with pytest.raises(FormatError, match="cannot be written to: permission denied"):
            check_report(path)


def test_the_directory_of_a_links_target_must_be_writable(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "locked" / "report")
    monkeypatch.setattr(os, "access", lambda directory, _mode: Path(directory).name != "locked")
    with pytest.raises(FormatError, match="locked cannot be written to"):
        check_report(tmp_path / "link")
    check_report(tmp_path / "report")
