"""Locks on files and directories that one process at a time may write to."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

PATIENCE = 2.0  # seconds of waiting before a warning says what is waited for
logger = logging.getLogger("nextn")


class LockedError(ValueError):
    """Another process holds a lock; the message says which one, and what to do."""


class FileLock:
    """Exclusive use of a file or directory, by a lock file that names the host and the process that holds it.

    A directory's lock file lies in it, a file's beside it. A lock is stale where its process is gone from this host,
    and is then replaced; whether a process of another host or container is alive cannot be known, so its lock is
    respected. The thread that holds a lock may take it again (`compress` runs `train`).

    Args:
        target: what is locked. A directory must exist; a file need not, but its directory must.
        wait: how many seconds to wait for another process or thread to release the lock. A warning says so once.

    Raises:
        LockedError: on entering, where another process or thread holds the lock.
    """

    # By process (a forked one inherits the dict, but no lock) and lock file: the thread that holds it, and how often.
    _held: ClassVar[dict[tuple[int, str], list[int]]] = {}
    _changing = threading.Lock()

    def __init__(self, target: str | Path, wait: float = 0.0) -> None:
        self.target, self.wait = Path(target), wait
        real = Path(os.path.realpath(target))  # two names of one file have one lock
        self.path = real / "nextn.lock" if real.is_dir() else real.with_name(f"{real.name}.lock")

    @property
    def _key(self) -> tuple[int, str]:
        return os.getpid(), str(self.path)

    def __enter__(self) -> FileLock:
        start, warned = time.monotonic(), False
        while True:
            try:
                with self._changing:
                    self._enter()
                return self
            except LockedError as error:
                waited = time.monotonic() - start
                if waited >= self.wait:
                    raise
                if not warned and waited >= PATIENCE:
                    logger.warning("Waiting, for at most %.0f s more: %s", self.wait - waited, error)
                    warned = True
            time.sleep(0.1)

    def _enter(self) -> None:
        thread = threading.get_ident()
        held = self._held.get(self._key)
        if held is None:
            _take(self.path, self.target)
            self._held[self._key] = [thread, 1]
        elif held[0] == thread:
            held[1] += 1
        else:
            raise LockedError(f"{self.target} is in use by another thread of this process; wait until it ends.")

    def __exit__(self, *_: Any) -> None:
        with self._changing:
            held = self._held.get(self._key)
            if held is None:  # a forked process leaves the block of its parent, which has the lock
                return
            held[1] -= 1
            if not held[1]:
                del self._held[self._key]
                _release(self.path)


class Owner(BaseModel):
    """The process that holds a lock, as its lock file describes it.

    Attributes:
        boot: id of the boot of the machine, None where there is none (outside of Linux).
        namespace: of process ids: a container has its own; likewise.
        start: when the process started, None where that is not known.
        token: of this lock alone.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    host: str
    boot: str | None
    namespace: str | None
    pid: PositiveInt
    start: float | None
    token: str = Field(pattern=r"^[0-9a-f]{16}$")

    @classmethod
    def new(cls) -> Owner:
        """This process, with a new token."""
        boot = namespace = None
        with suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(
            host=socket.gethostname(),
            boot=boot,
            namespace=namespace,
            pid=os.getpid(),
            start=_start_of(os.getpid()),
            token=secrets.token_hex(8),
        )

    def shares_process_ids(self, other: Owner) -> bool:
        """Whether process ids mean the same to both."""
        return (self.host, self.boot, self.namespace) == (other.host, other.boot, other.namespace)

    def is_gone(self) -> bool:
        """Whether this process has ended; meaningful only to one that shares its process ids."""
        try:
            if psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False
        return _start_of(self.pid) != self.start  # else the process id is another one's by now


def _take(path: Path, target: Path) -> None:
    """Create a lock file. It appears with its content in place, so that nobody reads half of it."""
    owner = Owner.new()
    while not _create(path, owner.model_dump_json()):
        try:
            holder = _read(path)
        except FileNotFoundError:  # it was released since
            continue
        if holder is None or not holder.shares_process_ids(owner) or not holder.is_gone():
            raise LockedError(
                f"{target} is in use by {_name(holder, owner)}; wait until it ends, or if it is gone, remove {path}."
            )
        _remove_stale(path, holder)


def _name(holder: Owner | None, owner: Owner) -> str:
    if holder is None:
        return "another process"
    elsewhere = holder.host == owner.host and not holder.shares_process_ids(owner)
    return f"process {holder.pid} on {holder.host}{' (another container or boot)' if elsewhere else ''}"


def _create(path: Path, content: str) -> bool:
    """Create a file with its content unless it exists."""
    written = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        written.write_text(content)
        os.link(written, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links, or one that cannot be written
        try:
            with path.open("x") as file:
                file.write(content)
        except FileExistsError:
            return False
    finally:
        written.unlink(missing_ok=True)
    return True


def _remove_stale(path: Path, stale: Owner) -> None:
    """Remove a stale lock, and never the fresh one of a process that was faster.

    Only the holder of a second lock, which is named after the stale one's token, may remove that one.
    """
    guard = path.with_name(f"{path.name}.{stale.token}")
    try:
        _take(guard, path)
    except LockedError:  # another process is removing it
        time.sleep(0.01)
        return
    try:
        with suppress(FileNotFoundError):
            if _read(path) == stale:
                path.unlink()
    finally:
        _release(guard)


def _release(path: Path) -> None:
    """Remove a lock file of this process; it may have been removed by hand, and another process come in its place."""
    with suppress(FileNotFoundError):
        holder = _read(path)
        if holder and holder.pid == os.getpid() and holder.shares_process_ids(Owner.new()):
            path.unlink()


def _read(path: Path) -> Owner | None:
    """Who holds a lock; None where the file does not say.

    Raises:
        FileNotFoundError: where there is no lock file.
    """
    try:
        return Owner.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        return None


def _start_of(pid: int) -> float | None:
    """When a process started; None where that cannot be read.

    On Linux in clock ticks since boot: psutil's `create_time` changes there when the system's clock is set.
    """
    try:
        if psutil.LINUX:
            return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return psutil.Process(pid).create_time()
    except (OSError, ValueError, IndexError, psutil.Error):
        return None
