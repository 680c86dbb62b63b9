"""A directory of files that are costly to make: checked before use, and made by one process at a time."""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from nextn.files import sha256
from nextn.lock import FileLock, LockedError

MAKING = ".making"
WAIT = 900.0  # seconds for another process that makes the same file
logger = logging.getLogger("nextn")


class Store:
    """Files by key in a directory, each with the SHA-256 of its content in its name.

    A damaged file is removed instead of returned. A file appears with its content in place. Of several processes that
    make the same file, one does and the others wait for it; leftovers of killed processes are removed.

    Args:
        directory: made when the first file is.
        suffix: of the names of all files.
    """

    def __init__(self, directory: Path, suffix: str = "") -> None:
        self.directory, self.suffix = directory, suffix

    def get(self, key: str) -> Path | None:
        """The intact file of a key; None where there is none.

        Raises:
            OSError: where a file cannot be read, or a damaged one cannot be removed.
        """
        for path, digest in self._files(key):
            with suppress(FileNotFoundError):  # another process has removed it
                if sha256(path) == digest:
                    return path
                path.unlink()
                logger.warning("%s is damaged and is removed.", path)
        return None

    def size(self, key: str) -> int:
        """How many bytes `get` reads."""
        total = 0
        for path, _ in self._files(key):
            with suppress(FileNotFoundError):  # another process has removed it
                total += path.stat().st_size
        return total

    def make(self, key: str, write: Callable[[Path], object]) -> Path:
        """The intact file of a key, written where there is none.

        Args:
            write: writes the file to a path, in a directory that is removed afterwards.

        Raises:
            OSError: where the directory cannot be written.
            LockedError: where another process has been making the file for too long.
        """
        if (path := self.get(key)) is not None:
            return path
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self.directory / key, WAIT):
            if (path := self.get(key)) is not None:  # another process has made it meanwhile
                return path
            self._remove_leftovers()
            with tempfile.TemporaryDirectory(MAKING, f"{key}.", self.directory) as scratch:
                made = Path(scratch) / f"made{self.suffix}"
                write(made)
                kept = self.directory / f"{key}.{sha256(made)}{self.suffix}"
                os.replace(made, kept)
        return kept

    def read(self, key: str) -> bytes | None:
        """The content of a key's intact file; None where there is none."""
        with suppress(FileNotFoundError):  # another process has replaced it
            if (path := self.get(key)) is not None:
                return path.read_bytes()
        return None

    def put(self, key: str, content: bytes) -> None:
        """Store the content of a key, in place of an earlier one.

        Raises:
            OSError, LockedError: see `make`.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self.directory / key, wait=10.0):
            for path, _ in self._files(key):
                path.unlink(missing_ok=True)
            self.make(key, lambda path: path.write_bytes(content))

    def _files(self, key: str) -> Iterator[tuple[Path, str]]:
        """The files of a key, and the digest that each of them should have."""
        name = re.compile(f"{re.escape(key)}\\.([0-9a-f]{{64}}){re.escape(self.suffix)}")
        for path in sorted(self.directory.glob(f"{glob.escape(key)}.*")):
            if match := name.fullmatch(path.name):
                yield path, match[1]

    def _remove_leftovers(self) -> None:
        """Remove the directories of processes that were killed: those whose key nobody holds."""
        for directory in self.directory.glob(f"*{MAKING}"):
            try:
                with FileLock(self.directory / directory.name.rsplit(".", 2)[0]):
                    shutil.rmtree(directory, ignore_errors=True)
            except LockedError:
                continue
