"""What is stored comes back intact or not at all, and is made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nextn import store
from nextn.lock import FileLock
from nextn.store import Store

# Without the package, whose import takes seconds.
ALONE = f"""
import sys, time, types
from pathlib import Path
sys.modules["nextn"] = types.ModuleType("nextn")
sys.modules["nextn"].__path__ = [{str(Path(store.__file__).parent)!r}]
from nextn.store import Store
"""


def child(code: str, *words: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", ALONE + code, *map(str, words)], text=True, **pipes)


@pytest.mark.parametrize("suffix", ["", ".pt2"])
def test_what_is_put_is_read_and_replaced(tmp_path, suffix):
    kept = Store(tmp_path / "new" / "place", suffix)
    assert kept.get("a") is None and kept.read("a") is None
    for content in (b"one", b"", b"two"):
        kept.put("a", content)
        kept.put("a.b", b"another key")
        assert kept.read("a") == content and kept.size("a") == len(content)
    assert len(list(kept.directory.iterdir())) == 2
    assert kept.get("a").name.endswith(suffix)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 99)])
def test_a_damaged_file_is_removed_with_a_warning_and_made_anew(tmp_path, damage, caplog):
    kept, written = Store(tmp_path, ".pt2"), []

    def write(path: Path) -> None:
        written.append(path.write_bytes(b"content" * 10))

    path = kept.make("key", write)
    assert kept.make("key", write) == path and len(written) == 1
    damage(path)
    assert kept.get("key") is None and not path.exists() and f"{path} is damaged" in caplog.text
    assert kept.make("key", write) == path and len(written) == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_cannot_be_made_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        Store(tmp_path).make("key", lambda path: (path.write_bytes(b"half"), [][1:] or exec("raise RuntimeError")))
    assert not list(tmp_path.iterdir())


def test_two_processes_make_one_file_once(tmp_path):
    code = """
def write(path):
    print("made", flush=True)
    sys.stdin.readline()
    path.write_bytes(b"content")
print("ready", flush=True)
path = Store(Path(sys.argv[1])).make("key", write)
print(path.read_bytes().decode())
"""
    first, second = child(code, tmp_path), child(code, tmp_path)
    assert first.stdout.readline() == second.stdout.readline() == "ready\n"
    for process in (first, second):  # whichever of them is to write it
        process.stdin.close()
    said = [process.stdout.read() for process in (first, second)]
    assert first.wait() == second.wait() == 0
    assert sorted(said) == ["content\n", "made\ncontent\n"]
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_make_one_file_once(tmp_path):
    kept, written, threads = Store(tmp_path), [], []

    def write(path: Path) -> None:
        written.append(path.write_bytes(b"content"))

    for _ in range(4):
        threads.append(threading.Thread(target=kept.make, args=("key", write)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(written) == 1 and kept.read("key") == b"content"


def test_what_a_killed_process_left_is_removed_and_what_another_makes_is_not(tmp_path):
    code = """
def write(path):
    path.write_bytes(b"half")
    print("half", flush=True)
    sys.stdin.read()
Store(Path(sys.argv[1])).make(sys.argv[2], write)
"""
    killed, at_work = child(code, tmp_path, "other-key"), child(code, tmp_path, "key.at-work")
    assert killed.stdout.readline() == at_work.stdout.readline() == "half\n"
    killed.kill()
    killed.communicate()
    assert len(list(tmp_path.glob("*.making"))) == 2
    kept = Store(tmp_path)
    kept.put("key", b"content")
    assert [path.name.split(".making")[0].rsplit(".", 1)[0] for path in tmp_path.glob("*.making")] == ["key.at-work"]
    assert {path.name for path in tmp_path.glob("*.lock")} == {"key.at-work.lock"}
    at_work.communicate()
    assert kept.read("key.at-work") == b"half" and kept.read("key") == b"content"


def test_the_lock_of_a_lost_host_ends_the_wait_at_last(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "WAIT", 0.2)
    with FileLock(tmp_path / "key") as lock:
        content = json.loads(lock.path.read_text()) | {"host": "elsewhere"}
    lock.path.write_text(json.dumps(content))
    with pytest.raises(store.LockedError, match="on elsewhere"):
        Store(tmp_path).make("key", lambda path: path.write_bytes(b""))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_cannot_be_written_raises_os_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        Store(tmp_path).put("key", b"")


def test_a_file_that_another_process_removed_is_not_called_damaged(tmp_path, monkeypatch, caplog):
    kept = Store(tmp_path)
    kept.put("key", b"content")
    (entry,) = kept._files("key")
    monkeypatch.setattr(kept, "_files", lambda _key: [entry])  # as listed before the other process removed it
    entry[0].unlink()
    assert kept.get("key") is None and kept.size("key") == 0 and not caplog.messages


def test_a_file_that_is_replaced_while_it_is_read_is_none(tmp_path, monkeypatch):
    kept = Store(tmp_path)
    kept.put("key", b"content")

    path = kept.get("key")
    monkeypatch.setattr(kept, "get", lambda _key: path.unlink() or path)
    assert kept.read("key") is None
