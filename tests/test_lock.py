"""One process at a time writes to an output, and a killed one blocks nobody."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nextn import lock
from nextn.lock import FileLock, LockedError

# Without the package, whose import takes seconds.
ALONE = f"import sys, time; sys.path.insert(0, {str(Path(lock.__file__).parent)!r}); from lock import *\n"
HOLD = ALONE + "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"

PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], **PIPES)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def stored(target, **changes):
    """The lock of this process, as another one finds it, with other values."""
    with FileLock(target) as taken:
        content = json.loads(taken.path.read_text()) | changes
    taken.path.write_text(json.dumps(content))
    return taken.path


def test_another_process_is_refused_by_name_of_the_first(tmp_path, holder):
    with pytest.raises(LockedError, match=f"in use by process {holder.pid} on {socket.gethostname()}.*nextn.lock"):
        FileLock(tmp_path).__enter__()


def test_the_lock_of_a_killed_process_is_replaced_reaped_or_not(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie still
    with FileLock(tmp_path):
        assert json.loads((tmp_path / "nextn.lock").read_text())["pid"] == os.getpid()
    holder.wait()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="the start of a process is known on Linux")
def test_a_reused_process_id_is_no_holder(tmp_path):
    stored(tmp_path, start=1)
    with FileLock(tmp_path):
        pass


def test_the_lock_of_another_host_is_respected_and_can_be_removed(tmp_path):
    path = stored(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(LockedError, match=f"on elsewhere; .* if it is gone, remove {path}"):
        FileLock(tmp_path).__enter__()
    path.unlink()
    with FileLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_lock_that_names_nobody_is_respected(tmp_path, content):
    (tmp_path / "nextn.lock").write_text(content)
    with pytest.raises(LockedError, match="in use by another process"):
        FileLock(tmp_path).__enter__()


def test_it_is_released_after_an_error_and_one_thread_may_take_it_twice(tmp_path):
    file = tmp_path / "answers.jsonl"
    with pytest.raises(RuntimeError), FileLock(file), FileLock(file):
        assert (tmp_path / "answers.jsonl.lock").exists()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_another_thread_and_another_name_of_the_same_file_are_refused(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "answers.jsonl")
    refused = []

    def take():
        try:
            FileLock(tmp_path / "link.jsonl").__enter__()
        except LockedError as error:
            refused.append(str(error))

    with FileLock(tmp_path / "answers.jsonl"):
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "another thread" in refused[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_has_not_the_lock_of_its_parent(tmp_path):
    with FileLock(tmp_path):
        if not (child := os.fork()):
            try:
                FileLock(tmp_path).__enter__()
            except LockedError:
                os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


def test_without_hard_links_a_lock_is_exclusive_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.os, "link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with FileLock(tmp_path) as taken:
        assert [file.name for file in tmp_path.iterdir()] == ["nextn.lock"]
        assert not lock._create(taken.path, "")
    assert not list(tmp_path.iterdir())


def test_a_fresh_lock_is_not_removed_in_place_of_the_stale_one(tmp_path):
    """Two processes find the same stale lock; the slower one comes to remove it when the faster one has its own."""
    path = stored(tmp_path, start=1, pid=2**22 + 1)
    stale = lock._read(path)
    with FileLock(tmp_path):
        lock._remove_stale(path, stale)
        assert json.loads(path.read_text())["pid"] == os.getpid()


TAKE_OVER = (
    ALONE
    + """
print("ready", flush=True); sys.stdin.readline()
try:
    with FileLock(sys.argv[1]): print("held", flush=True); sys.stdin.readline()
except LockedError: print("refused", flush=True)
"""
)


def test_of_many_processes_one_takes_a_stale_lock(tmp_path):
    stored(tmp_path, start=1, pid=2**22 + 1)
    processes = [subprocess.Popen([sys.executable, "-c", TAKE_OVER, str(tmp_path)], **PIPES) for _ in range(4)]
    for said in ("ready", "taken or not"):
        lines = [process.stdout.readline().strip() for process in processes]
        if said == "ready":
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
    assert sorted(lines) == ["held", "refused", "refused", "refused"]
    for process in processes:
        process.communicate("\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["boot", "namespace"])
@pytest.mark.skipif(not os.path.exists("/proc/self/ns/pid"), reason="there are no PID namespaces here")
def test_a_lock_of_another_container_or_boot_with_the_same_host_name_is_respected(tmp_path, field):
    stored(tmp_path, pid=2**22 + 1, **{field: "another"})
    with pytest.raises(LockedError, match=rf"on {socket.gethostname()} \(another container or boot\); .* remove"):
        FileLock(tmp_path).__enter__()


def test_a_lock_of_the_same_process_id_in_another_container_is_not_released(tmp_path):
    with FileLock(tmp_path) as taken:
        content = json.loads(taken.path.read_text())
        taken.path.write_text(json.dumps(content | {"namespace": "another"}))
    assert taken.path.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"pid": "12"},
        {"pid": True},
        {"pid": -1},
        {"pid": None},
        {"host": 1},
        {"start": "1"},
        {"token": "../x"},
        {"token": "0123456789abcdef\n"},
    ],
    ids=str,
)
def test_a_lock_with_values_of_wrong_types_is_respected(tmp_path, wrong):
    stored(tmp_path, **({"start": 1} | wrong))
    with pytest.raises(LockedError, match="in use by another process"):
        FileLock(tmp_path).__enter__()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_process_leaves_the_block_of_its_parent_and_its_lock(tmp_path):
    parent = os.getpid()
    child = code = 0
    try:
        with FileLock(tmp_path) as taken:
            child = os.fork()
            if child:
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        code = 4
    if os.getpid() != parent:
        os._exit(code or (0 if taken.path.exists() else 5))
    assert code == 0 and not taken.path.exists()


def test_waiting_for_a_lock_warns_once_how_to_remove_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    path = stored(tmp_path, host="elsewhere", pid=1)
    with pytest.raises(LockedError):
        FileLock(tmp_path, wait=0.5).__enter__()
    assert len(caplog.messages) == 1 and f"if it is gone, remove {path}" in caplog.text
    assert "Waiting" in caplog.text and "on elsewhere" in caplog.text
    with pytest.raises(LockedError):
        FileLock(tmp_path).__enter__()
    assert len(caplog.messages) == 1
