"""Our own layout: an untouched plain model, and a small extra in its subdirectory `nextn/`.

DIR/config.json, model.safetensors, tokenizer…   the plain model (absent where only heads were saved)
DIR/nextn/config.json                            the MultiTokenConfig, and which base the heads belong to
DIR/nextn/heads.safetensors                      the heads
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from nextn.config import ConfigError, MultiTokenConfig
from nextn.decoding.engine import Engine
from nextn.formats import FormatError
from nextn.formats.bundled import NAME as BUNDLED
from nextn.formats.bundled import find, shipped_heads
from nextn.model import MultiTokenModel, end_tokens
from nextn.trunk import Trunk

EXTRA = "nextn"
FORMAT = 1
logger = logging.get_logger("nextn")


# --- writing ------------------------------------------------------------------------------------------------------


def save(model: MultiTokenModel, directory: str | Path, tokenizer: Any = None) -> None:
    """Write the plain model and the heads to `directory`."""
    directory = writable(directory)
    model.base.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    save_heads(model, directory, base_hash=hash_of(model.base, directory), tokenizer=tokenizer)


def save_heads(
    model: MultiTokenModel,
    directory: str | Path,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
    base_hash: str | None = None,
    tokenizer: Any = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write the heads alone, as `directory`/nextn/. The tensors are in place before the config names them.

    Args:
        base_name: how the base is to be found again (hub name or path); default: where it was loaded from.
        dtype: the stored dtype of floating tensors; default: as they are.
        base_hash: the base's hash, where it is known; default: `hash_of(model.base)`.
        tokenizer: that of the base; heads that know it refuse another one.
        tensors: the heads' tensors by name, where they had to be gathered; default: the model's.
    """
    extra = writable(Path(directory) / EXTRA)
    stored = {
        name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor).contiguous().cpu()
        for name, tensor in (model.heads.state_dict() if tensors is None else tensors).items()
    }
    temporary = extra / "heads.safetensors.part"
    save_file(stored, temporary, metadata={"format": "pt"})
    os.replace(temporary, extra / "heads.safetensors")
    base = model.base
    description = {
        "format": FORMAT,
        "multi_token": model.multi_token.model_dump(),
        "base": {
            "name": _lasting(base_name or base.config._name_or_path),
            "architecture": type(base).__name__,
            "hash": base_hash or hash_of(base),
            "tokenizer": None if tokenizer is None else hash_of_tokenizer(tokenizer),
            "vocab_size": model.trunk.vocab_size,
            "hidden_size": model.trunk.width,
        },
    }
    temporary = extra / "config.json.part"
    temporary.write_text(json.dumps(description, indent=2) + "\n")
    os.replace(temporary, extra / "config.json")


def _lasting(name: str) -> str:
    """A directory's name from anywhere; the name of a model on the hub or of the bundled one as it is."""
    return str(Path(name).resolve()) if name != BUNDLED and name and Path(name).is_dir() else name


def writable(directory: str | Path) -> Path:
    """The directory, made where it is missing.

    Raises:
        FormatError: where it cannot be written to.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{directory} cannot be written to: {error.strerror}.") from None
    if not os.access(directory, os.W_OK):
        raise FormatError(f"{directory} cannot be written to: permission denied.")
    return directory


def hash_of(base: PreTrainedModel, directory: str | Path | None = None) -> str:
    """SHA-256 over the sorted tensor names, shapes, dtypes and bytes of a base, as it is stored.

    The files decide where there are any (in `directory`, or where the base was loaded from), so that the dtype that
    a base was loaded in changes nothing; a base that was never stored is hashed in memory.
    """
    files = sorted(_weights_directory(base, directory).glob("*.safetensors"))
    digest = hashlib.sha256()
    for name, tensor in _stored(files) if files else _in_memory(base):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return "sha256:" + digest.hexdigest()


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the sorted vocabulary, added tokens included."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(vocabulary.encode()).hexdigest()


def _weights_directory(base: PreTrainedModel, directory: str | Path | None) -> Path:
    """Where the weights of a base lie: in `directory`, where it was loaded from, or in the hub's cache."""
    name = str(directory or base.config._name_or_path)
    if name.count("/") == 1 and not Path(name).is_dir():  # owner/name
        cached = try_to_load_from_cache(name, "config.json", revision=getattr(base.config, "_commit_hash", None))
        if isinstance(cached, str):
            return Path(cached).parent
    return Path(name or os.devnull)  # without a name it was made in memory: no files


def _stored(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some safetensors files by name, one at a time in memory.

    Raises:
        FormatError: for a truncated file.
    """
    try:
        opened = [safe_open(file, "pt") for file in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)
        for name in sorted(where):
            yield name, where[name].get_tensor(name)
    except SafetensorError as error:
        raise FormatError(f"{files[0].parent}: the weights cannot be read ({error}); a file is truncated.") from None


def _in_memory(base: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    tied = getattr(base, "all_tied_weights_keys", {})
    for name, tensor in sorted(base.state_dict().items()):
        if name not in tied:
            yield name, tensor.detach().cpu()


# --- reading ------------------------------------------------------------------------------------------------------


def load(
    directory: str | Path,
    base: PreTrainedModel | None = None,
    dtype: torch.dtype | None = None,
    config: MultiTokenConfig | None = None,
    **kwargs: Any,
) -> MultiTokenModel:
    """Open a saved model, or heads on their base.

    Args:
        directory: a directory with `nextn/` in it, or the name of the bundled model (with the heads that ship for it).
        base: the base model, where it is loaded already; else it is read from `directory` or, for heads alone, from
            where the heads say.
        dtype: of trunk and heads; default: as stored.
        config: in place of the stored one; it must describe the same tensors.
        kwargs: passed on to AutoModelForCausalLM.from_pretrained.

    Raises:
        FormatError: for a missing or truncated file, or heads that do not fit the base.
    """
    directory = heads_directory(directory)
    description, config = describe(directory), config or config_of(directory)
    if base is None:
        base = load_base(base_of(directory), dtype=dtype, **kwargs)
    _check_fit(description["base"], base)
    model = MultiTokenModel(base, config)
    load_heads(model, directory)
    model.heads.to(model.trunk.dtype)
    return model.eval()


def config_of(directory: str | Path) -> MultiTokenConfig:
    """What the heads in a directory predict, and how."""
    directory = heads_directory(directory)
    try:
        return MultiTokenConfig(**describe(directory)["multi_token"])
    except ConfigError as error:
        raise FormatError(f"{directory / EXTRA / 'config.json'}: {error}") from None


def base_of(directory: str | Path) -> str:
    """Where the base model of heads is: beside them, or where they say."""
    return find(base_name(directory))


def base_name(directory: str | Path) -> str:
    """How the base model of heads is called: the directory that they lie in with it, or what they say."""
    directory = heads_directory(directory)
    name = str(describe(directory)["base"]["name"])
    return str(directory) if (directory / "config.json").is_file() else name


def heads_directory(directory: str | Path) -> Path:
    """Where heads are: the shipped ones by the name of the bundled model, any other where the path says."""
    return shipped_heads() if str(directory) == BUNDLED else Path(directory)


def load_base(name: str, dtype: torch.dtype | None = None, **kwargs: Any) -> PreTrainedModel:
    """A plain causal language model from a path, a hub name, or the name of the bundled model.

    Raises:
        FormatError: where it is missing or broken.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(find(name), dtype=dtype or "auto", **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise FormatError(f"The base model {name} cannot be opened: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first line of what another library says, as the end of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:") + "."


def heads_file(directory: str | Path) -> Path:
    """The tensors of the heads in a directory."""
    return Path(directory) / EXTRA / "heads.safetensors"


def load_heads(model: MultiTokenModel, directory: str | Path) -> None:
    """Put the tensors of `directory`/nextn/heads.safetensors into the model's heads."""
    path = heads_file(directory)
    tensors = read_tensors(path)
    wanted = model.heads.state_dict()
    wrong = sorted(wanted.keys() ^ tensors.keys()) or sorted(
        name for name in wanted if wanted[name].shape != tensors[name].shape
    )
    if wrong:
        raise FormatError(f"{path} does not hold the heads that its config describes (first difference: {wrong[0]}).")
    model.heads.load_state_dict(tensors)


def describe(directory: str | Path) -> dict[str, Any]:
    """The description of the heads in a directory, from `nextn/config.json`."""
    path = Path(directory) / EXTRA / "config.json"
    if not path.is_file():
        raise FormatError(f"{directory} holds no heads (there is no {path}).")
    try:
        description = json.loads(path.read_text())
        description["multi_token"]["n"], description["format"]
        [description["base"][key] for key in ("name", "architecture", "hash", "vocab_size", "hidden_size")]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise FormatError(f"{path} is not a description of heads; it is damaged or of another program.") from None
    if description["format"] != FORMAT:
        raise FormatError(f"{path} has format {description['format']}; this nextn reads format {FORMAT}. Update nextn.")
    return description


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FormatError: where it is missing or damaged.
    """
    if not path.is_file():
        raise FormatError(f"There is no {path}; the heads are missing.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path} cannot be read ({error}); it is truncated or damaged. Save it again.") from None


def _check_fit(stated: dict[str, Any], base: PreTrainedModel) -> None:
    weight = base.get_output_embeddings().weight
    for what, have in (("vocab_size", weight.shape[0]), ("hidden_size", weight.shape[1])):
        if stated[what] != have:
            raise FormatError(
                f"The heads were made for a base with {what} {stated[what]}, but this one has {have}; "
                f"use the base {stated['name']}."
            )
    if stated["hash"] != hash_of(base):
        logger.warning(
            "The base model is not the one that the heads were trained on, or has another dtype (its hash differs). "
            "Decoding stays lossless; acceptance may be lower."
        )


def open_for_decoding(
    name: str, heads: int | None = None, dtype: str = "auto", rows: int = 1, **settings: Any
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """An engine and its tokenizer, from a directory with heads or, with heads=1, from any causal model.

    Args:
        heads: None for all heads, 1 for the plain model alone.
        dtype: `auto` (as stored), `float32` or `bfloat16`.
        rows: how many prompts are decoded side by side.
        settings: `depth` and `tree` of `Engine`, where there are heads.
    """
    wanted = None if dtype == "auto" else named_dtype(dtype)
    if heads not in (None, 1):
        raise FormatError(f"--heads is {heads}; give 1 for the plain model, or leave it out for all heads.")
    if heads == 1:
        plain = base_of(name) if has_heads(name) else name
        base = load_base(plain, wanted).eval()
        engine = Engine(Trunk(base), None, rows, end_tokens(base))
    else:
        model = load(name, dtype=wanted)
        engine, plain = model.engine(rows, **settings), model.base.config._name_or_path
    tokenizer = load_tokenizer(plain)
    if heads != 1:
        check_tokenizer(name, tokenizer)
    return engine, tokenizer


def check_tokenizer(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that is not the one that the heads in a directory were trained with."""
    stated = describe(heads_directory(directory))["base"].get("tokenizer")
    if stated is not None and stated != hash_of_tokenizer(tokenizer):
        raise FormatError(
            f"The heads in {directory} were trained with another tokenizer than {tokenizer.name_or_path} has; "
            "use the base that they name."
        )


def named_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as a dtype."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def has_heads(directory: str | Path) -> bool:
    """Whether a directory has heads in our layout."""
    return (Path(directory) / EXTRA / "config.json").is_file()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, from a path or a hub name."""
    try:
        return AutoTokenizer.from_pretrained(find(name))
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"The tokenizer of {name} cannot be opened: {_reason(error)}") from None


def contents(directory: str | Path) -> dict[str, Any]:
    """What a directory holds: base, hash, heads, and parameters and bytes of each part of the heads."""
    directory = heads_directory(directory)
    description = describe(directory)
    tensors = read_tensors(Path(directory) / EXTRA / "heads.safetensors")
    parts: dict[str, dict[str, int]] = {}
    plain = sorted(directory.glob("*.safetensors"))
    if plain:
        parts["plain model"] = _size(tensor for _, tensor in _stored(plain))
    for part in sorted({_part(name) for name in tensors}):
        parts[part] = _size(tensor for name, tensor in tensors.items() if _part(name) == part)
    parts["all heads"] = _size(tensors.values())
    config = MultiTokenConfig(**description["multi_token"])
    return {
        "base": f"{description['base']['name']} ({description['base']['architecture']})",
        "hash": description["base"]["hash"],
        "heads": config.kind,
        "n": config.n,
        "output": str(config.output),
        "tap": config.tap,
        "parts": parts,
    }


def _part(name: str) -> str:
    """`step.layer.mlp.up_proj.weight` belongs to `step.layer`, `steps.0.enorm.weight` to `steps.0.enorm`."""
    words = name.split(".")
    return ".".join(words[: 3 if len(words) > 2 and words[1].isdigit() else 2])


def _size(tensors: Iterable[Tensor]) -> dict[str, int]:
    found = list(tensors)
    return {
        "parameters": sum(tensor.numel() for tensor in found),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in found),
    }
