"""Check the files of a model directory before any of them is opened.

A directory from somewhere else may hold links to files outside it, named pipes and devices that block a reader or never
end, pickles that run code, weight indexes that name files elsewhere, and headers that state absurd sizes.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from nextn.formats import FormatError

TEXT_LIMIT = 2**28  # bytes; the largest published tokenizer.json has 35 MB
JSON_LIMIT = 2**26  # bytes; the largest published weight index has 15 MB
HEADER_LIMIT = 2**25  # bytes; 100,000 tensors take about 12 MB
_TEXT = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")  # what transformers reads as a whole
_SUBFOLDERS = ("nextn", "additional_chat_templates", "custom_generate")  # what is read beside the directory's own files
_PICKLES = ("pytorch_model*.bin*", "consolidated*.pth")


@contextmanager
def reading() -> Iterator[None]:
    """Turn an error of the file system into a FormatError that names the file; also a decorator."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{error.filename or 'A file'} cannot be read: {error.strerror or error}.") from None


@reading()
def check_directory(directory: str | Path) -> None:
    """Check the files that opening a model, heads or a tokenizer may read.

    Hidden files and other folders are not read, and not checked. The links of the Hugging Face cache are followed.

    Raises:
        FormatError: for a link that leaves the directory, what is no regular file, a text file of absurd size, and
            what cannot be read.
    """
    directory = Path(directory)
    roots = _roots(directory)
    adapters = sorted((directory / "nextn" / "adapters").glob("*"))
    for folder in (directory, *(directory / name for name in _SUBFOLDERS), *adapters):
        if not folder.is_dir():
            continue
        if not _is_inside(folder, roots):
            raise FormatError(f"{folder} is a link that leaves {directory}; put the files there instead.")
        for path in sorted(folder.iterdir()):
            if not path.name.startswith(".") and not path.is_dir():
                _check_file(path, directory, roots)


@reading()
def check_weights(directory: str | Path) -> None:
    """Check the weights in a directory, and of the base that an adapter in it names.

    Raises:
        FormatError: for pickles without safetensors, an index that names files elsewhere, and a damaged file.
    """
    directory = Path(directory)
    _check_own_weights(directory)
    if (adapted := _adapted(directory)) is not None:
        check_directory(adapted)
        _check_own_weights(adapted)


@reading()
def check_header(path: Path) -> None:
    """Compare the length of a safetensors header with the size of its file before anything is read.

    Raises:
        FormatError: where the header cannot be right.
    """
    with path.open("rb") as file:
        stated = file.read(8)
    size, length = path.stat().st_size, int.from_bytes(stated, "little")
    if len(stated) < 8 or length > min(size - 8, HEADER_LIMIT):
        raise FormatError(
            f"{path} cannot be read: its header states {length:,} bytes, but the file has {size:,}; it is truncated or "
            "damaged. Save or download it again."
        )


@reading()
def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    """The content of a JSON file.

    Raises:
        FormatError: where it is missing, no regular file, too large, or no JSON.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is not a regular file.")
        if status.st_size > limit:
            raise FormatError(f"{path} has {status.st_size:,} bytes, over the limit of {limit:,}; it is damaged.")
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not JSON; it is damaged.") from None


def _roots(directory: Path) -> list[Path]:
    """The folders that the links of a directory may lead to: itself and, in the Hugging Face cache, the blobs."""
    root = directory.resolve()
    if root.parent.name != "snapshots":
        return [root]
    repository = root.parent.parent
    return [root, repository / "blobs", repository.parent / "blobs"]  # of this repository, and of all


def _is_inside(path: Path, roots: Iterable[Path]) -> bool:
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return False
    return any(target.is_relative_to(root) for root in roots)


def _check_file(path: Path, directory: Path, roots: Iterable[Path]) -> None:
    if not _is_inside(path, roots):
        raise FormatError(f"{path} is a link that leaves {directory}; put the file there instead.")
    try:
        status = path.stat()
    except OSError:  # a broken link: opening the file reports that it is missing
        return
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{path} is not a regular file; remove it from {directory}.")
    if path.suffix in _TEXT and status.st_size > TEXT_LIMIT:
        raise FormatError(f"{path} has {status.st_size:,} bytes, over the limit of {TEXT_LIMIT:,}; it is damaged.")


def _check_own_weights(directory: Path) -> None:
    _refuse_pickles(directory)
    named = _named_weights(directory)
    for path in sorted({*directory.glob("*.safetensors*"), *([directory / named] if named else [])}):
        _check_file(path, directory, _roots(directory))
        if path.name.endswith(".safetensors.index.json") and path.exists():
            _check_index(path, directory)
        elif path.name.endswith(".safetensors") and path.exists():
            check_header(path)


def _check_index(index: Path, directory: Path) -> None:
    """Each file that a weight index names must lie in the directory."""
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise FormatError(f"{index} is not an index of weights; it is damaged.")
    for name in sorted(set(files.values())):
        if _leaves(name) or not name.endswith(".safetensors"):
            raise FormatError(f"{index} names {name!r}, which is no safetensors file in {directory}.")
        _check_file(directory / name, directory, _roots(directory))
        if (directory / name).is_file():  # else opening it reports that it is missing
            check_header(directory / name)


def _leaves(name: str) -> bool:
    """Whether a relative name leads elsewhere, on any system."""
    paths = PurePosixPath(name), PureWindowsPath(name)
    return any(path.is_absolute() or path.drive or ".." in path.parts for path in paths)


def _named_weights(directory: Path) -> str | None:
    """The file of weights that a config names in place of the usual ones."""
    config = directory / "config.json"
    settings = read_json(config) if config.is_file() else {}
    named = settings.get("transformers_weights") if isinstance(settings, dict) else None
    if named is None:
        return None
    known = (".safetensors", ".safetensors.index.json")
    if not isinstance(named, str) or _leaves(named) or not named.endswith(known):
        raise FormatError(f"{config} names {named!r} as the weights, which is no safetensors file in {directory}.")
    return named


def _refuse_pickles(directory: Path) -> None:
    """Refuse weights that only a pickle holds, which runs code when it is opened."""
    if (directory / "adapter_model.bin").is_file() and not (directory / "adapter_model.safetensors").is_file():
        raise FormatError(f"{directory / 'adapter_model.bin'} is a pickle, which can run code; save it as safetensors.")
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles and not any(directory.glob("*.safetensors*")):
        raise FormatError(
            f"{directory} holds its weights as a pickle ({pickles[0]}), which can run code; convert it to safetensors "
            "with a tool that you trust, or take a safetensors version of the model."
        )


def _adapted(directory: Path) -> Path | None:
    """The directory of the base that an adapter names, which is opened with it."""
    config = directory / "adapter_config.json"
    settings = read_json(config) if config.is_file() else {}
    name = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None
