"""Our own layout: an untouched plain model, and a small extra in its subdirectory `nextn/`.

DIR/config.json, model.safetensors, tokenizer…   the plain model (absent where only heads were saved)
DIR/nextn/config.json                            the MultiTokenConfig, and which base the heads belong to
DIR/nextn/heads.safetensors                      the heads
DIR/nextn/adapters/NAME/                         an adapter of the plain model, as peft writes it
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging as python_logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from nextn.adapters import (
    activate_adapters,
    active_adapters,
    adapter_layers,
    adapter_tensors,
    insert_adapter,
    is_merged,
    plain_tensors,
    refuse_merged,
    set_adapter_tensors,
    under_plain_names,
    unwrapped,
)
from nextn.config import ConfigError, MultiTokenConfig
from nextn.decoding.engine import Engine
from nextn.digest import add_tensor
from nextn.files import replacing, write_json
from nextn.formats import FormatError
from nextn.formats.bundled import NAME as BUNDLED
from nextn.formats.bundled import find, name_of, shipped_heads
from nextn.formats.card import FILE as CARD
from nextn.formats.card import card
from nextn.formats.checks import check_directory, check_header, check_weights, read_json, reading
from nextn.formats.hub import FETCHING, fetched, is_hub_name
from nextn.formats.weights import check_loaded, check_stored_types, differs
from nextn.model import MultiTokenModel, end_tokens, try_heads
from nextn.quantized import saving_tensors
from nextn.trunk import Trunk

EXTRA = "nextn"
HEADS = "heads.safetensors"
ADAPTERS = "adapters"
FORMAT = 1
logger = logging.get_logger("nextn")
# Where the files of bases that `load_base` opened are: a config names neither another cache nor a subfolder.
_opened: WeakKeyDictionary[PreTrainedModel, Path] = WeakKeyDictionary()


# --- writing ------------------------------------------------------------------------------------------------------


def save(
    model: MultiTokenModel,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    merge_adapters: bool = False,
    base_name: str | None = None,
    is_main_process: bool = True,
    **settings: Any,
) -> None:
    """Write the plain model and the heads to `directory`.

    Args:
        tensors: the model's by name, where they had to be gathered; default: its state dict.
        merge_adapters: write a plain model with the adapters of the trunk added to its weights, rather than the plain
            model without them and the adapters beside the heads.
        base_name: where the base comes from (hub name or path); default: where it was loaded from.
        is_main_process: whether this process writes; the others help to gather what is sharded.
        settings: passed on to `save_pretrained` of the base.
    """
    model.heads.follow_vocabulary(model.trunk)
    directory = writable(directory)
    heads, base = (part_of(tensors, part) for part in ("heads", "base"))
    _save_plain(model.base, directory, base, merge_adapters, is_main_process=is_main_process, **settings)
    if not is_main_process:
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    save_heads(
        model,
        directory,
        base_name=base_name,
        base_hash=hash_of(model.base, directory),
        tokenizer=tokenizer,
        tensors=heads,
        base_tensors=base,
        adapters=not merge_adapters,
    )


def part_of(tensors: Mapping[str, Tensor] | None, part: str) -> dict[str, Tensor] | None:
    """The tensors of a module, by their names in it."""
    if tensors is None:
        return None
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def _save_plain(
    base: PreTrainedModel, directory: Path, tensors: dict[str, Tensor] | None, merged: bool, **settings: Any
) -> None:
    """Write the base without adapters, or with them merged; transformers alone would write the adapters only."""
    if not adapter_layers(base):
        base.save_pretrained(directory, state_dict=tensors, **settings)
        return
    plain = plain_tensors(base, base.state_dict() if tensors is None else tensors, merged)
    has_adapters, base._hf_peft_config_loaded = base._hf_peft_config_loaded, False
    try:
        with saving_tensors(base, plain):
            base.save_pretrained(directory, state_dict=plain, **settings)
    finally:
        base._hf_peft_config_loaded = has_adapters


def save_heads(
    model: MultiTokenModel,
    directory: str | Path,
    base_name: str | None = None,
    dtype: torch.dtype | None = None,
    base_hash: str | None = None,
    tokenizer: Any = None,
    tensors: dict[str, Tensor] | None = None,
    base_tensors: dict[str, Tensor] | None = None,
    adapters: bool = True,
) -> None:
    """Write the heads and the trunk's adapters, as `directory`/nextn/. The tensors are there before the config is.

    A model card is written where there is none.

    Args:
        base_name: how the base is to be found again (hub name or path); default: where it was loaded from.
        dtype: the stored dtype of the heads' floating tensors; default: as they are.
        base_hash: the base's hash, where it is known; default: `hash_of(model.base)`.
        tokenizer: that of the base; heads that know it refuse another one.
        tensors: the heads' tensors by name, where they had to be gathered; default: the model's.
        base_tensors: the base's, likewise.
        adapters: whether the adapters of the trunk are written.

    Raises:
        ConfigError: where the adapters are merged into the base weights in place.
        FormatError: where the directory cannot be written to.
    """
    model.heads.follow_vocabulary(model.trunk)
    if adapters:
        refuse_merged(model.base)
    extra = writable(Path(directory) / EXTRA)
    stored = {
        name: (tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
        for name, tensor in (model.heads.state_dict() if tensors is None else tensors).items()
    }
    _write_tensors(extra / HEADS, stored)
    base = model.base
    name = _lasting(base_name or base.config._name_or_path)
    description: dict[str, Any] = {
        "format": FORMAT,
        "multi_token": model.multi_token.model_dump(),
        "base": {
            "name": name,
            "architecture": type(base).__name__,
            "hash": base_hash or hash_of(base),
            "tokenizer": None if tokenizer is None else hash_of_tokenizer(tokenizer),
            "chat_template": None if tokenizer is None else hash_of_template(tokenizer),
            "vocab_size": model.trunk.vocab_size,
            "hidden_size": model.trunk.width,
        },
    }
    if adapters and adapter_layers(base):
        description["adapters"] = _save_adapters(base, extra / ADAPTERS, name, base_tensors)
    if model.held_out_tau is not None:
        description["held_out_tau"] = model.held_out_tau
    write_json(extra / "config.json", description)
    for path in (extra / ADAPTERS).glob("*/adapter_config.json"):  # of a model that was saved here before
        if path.parent.name not in description.get("adapters", {}).get("names", []):
            shutil.rmtree(path.parent)
    if not (readme := Path(directory) / CARD).exists():
        card(description, is_whole=(Path(directory) / "config.json").is_file()).save(readme)


def _save_adapters(
    base: PreTrainedModel, directory: Path, base_name: str, tensors: dict[str, Tensor] | None
) -> dict[str, list[str]]:
    """Write the adapters of a trunk as peft writes them, each to `directory`/NAME; returns how they are described."""
    for name, config in base.peft_config.items():
        if Path(name).name != name:
            raise FormatError(f"The adapter {name!r} cannot be saved: its name has to be that of a directory.")
        path = writable(directory / name)
        _write_tensors(path / "adapter_model.safetensors", adapter_tensors(base, name, tensors))
        stated = copy.deepcopy(config)
        stated.inference_mode, stated.base_model_name_or_path = True, base_name
        stated.save_pretrained(path)
    return {"names": sorted(base.peft_config), "active": active_adapters(base)}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(path) as part:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part, {"format": "pt"})


def _lasting(name: str) -> str:
    """A directory's name from anywhere; the name of a model on the hub or of the bundled one as it is."""
    name = name_of(name)
    return str(Path(name).resolve()) if name != BUNDLED and name and Path(name).is_dir() else name


def public_name(model: MultiTokenModel, base_name: str | None, repo_id: str | None) -> str:
    """What heads on the hub call their base: its name there, or their own repository where it lies beside them.

    Args:
        base_name: what it is to be called; default: where it was loaded from.
        repo_id: the repository of heads and base; None for heads alone.

    Raises:
        FormatError: where the base has no name that others can use.
    """
    name = name_of(base_name or model.base.config._name_or_path)
    if is_hub_name(name) or name == BUNDLED:
        return name
    if repo_id is None:
        raise FormatError(
            f"The base of these heads has no name on the hub (it is {name or 'made in memory'}): give base_name, or "
            "leave heads_only out."
        )
    return repo_id


def written(directory: Path) -> dict[str, int]:
    """When each file below a directory was last written, in nanoseconds."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_mtime_ns for path in files}


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


def hash_of(base: PreTrainedModel, directory: str | Path | None = None, cache_dir: str | Path | None = None) -> str:
    """SHA-256 over the sorted tensor names, shapes, dtypes and bytes of a base, as it is stored.

    The files count where there are any, so that the dtype that a base was loaded in changes nothing. A base that was
    never stored, or whose weights were changed since it was loaded, is hashed in memory. Adapters do not count, unless
    they are merged into the weights.

    Args:
        directory: where the base was just saved, perhaps with other weights than it has in memory; default: where it
            was loaded from.
        cache_dir: the hub's cache that it was loaded from; default: that of `load_base`, or the default one.
    """
    files = sorted(_weights_directory(base, directory, cache_dir).glob("*.safetensors"))
    loaded = {} if directory else under_plain_names(base, _tensors(base))
    digest = hashlib.sha256()
    for name, tensor in _with_progress(_stored(files)):
        if name in loaded and differs(tensor, loaded[name]):
            files = []
            break
        add_tensor(digest, name, tensor)
    if not files:
        digest = hashlib.sha256()
        for name, tensor in _with_progress(_in_memory(base)):
            add_tensor(digest, name, tensor)
    return "sha256:" + digest.hexdigest()


def _tensors(base: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and buffers by name; `state_dict` would gather the shards of all processes under FSDP."""
    return dict(chain(base.named_parameters(remove_duplicate=False), base.named_buffers(remove_duplicate=False)))


def _with_progress(tensors: Iterator[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Tensors with a progress bar, where they take more than two seconds."""
    return logging.tqdm(tensors, desc="checking the weights of the base", unit=" tensors", delay=2, leave=False)


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the sorted vocabulary, added tokens included."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(vocabulary.encode()).hexdigest()


def hash_of_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 over the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return "sha256:" + hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None


def _weights_directory(
    base: PreTrainedModel, directory: str | Path | None = None, cache_dir: str | Path | None = None
) -> Path:
    """Where the weights of a base are: in `directory`, where it was loaded from, or in the hub's cache."""
    if directory is None and base in _opened:
        return _opened[base]
    commit = getattr(base.config, "_commit_hash", None)
    return _directory(str(directory or base.config._name_or_path), commit, cache_dir)


def _directory(name: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The directory of a model: the one named, or that in the hub's cache; without a name it has no files."""
    if is_hub_name(name):
        cached = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
        if isinstance(cached, str):
            return Path(cached).parent
    return Path(name or os.devnull)


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
    for name, tensor in sorted(under_plain_names(base, base.state_dict()).items()):
        if name not in tied:
            yield name, tensor


# --- reading ------------------------------------------------------------------------------------------------------


def load(
    directory: str | Path,
    base: PreTrainedModel | None = None,
    dtype: torch.dtype | None = None,
    config: MultiTokenConfig | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> MultiTokenModel:
    """Open a saved model, or heads on their base.

    Args:
        directory: a directory with `nextn/` in it, a repository of the hub (owner/name) that has one, or the name of
            the bundled model (with the heads that ship for it).
        base: the base model, where it is loaded already; else it is read from `directory` or, for heads alone, from
            where the heads say.
        dtype: of trunk and heads; default: as stored.
        config: in place of the stored one; it must describe the same tensors.
        trust_remote_code: run the code that the base's repository brings; else such a base is refused.
        kwargs: passed on to AutoModelForCausalLM.from_pretrained. What is about fetching (`revision`, `token`,
            `cache_dir`, …) holds for heads on the hub too; a `revision` is that of their repository.

    Raises:
        FormatError: for a missing, damaged or unsafe file, or heads that do not fit the base.
        HostError: for a base that nextn cannot work with.
    """
    name, directory = directory, heads_directory(directory, **{key: kwargs[key] for key in FETCHING if key in kwargs})
    description, config = describe(directory), config or config_of(directory)
    if base is None:
        base_at = find(_base_name(name, directory))
        if is_hub_name(name) and base_at != str(name):
            kwargs.pop("revision", None)  # of the repository of the heads
        base = load_base(base_at, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    else:
        base = unwrapped(base)
    Trunk(base)  # refuses what is no causal language model
    _check_fit(description["base"], base, kwargs.get("cache_dir"))
    load_adapters(base, directory)
    _check_active_adapters(description, base)
    model = MultiTokenModel(base, config)
    model.held_out_tau = description.get("held_out_tau")
    load_heads(model, directory)
    model.heads.to(model.trunk.dtype)
    try_heads(model.eval())
    return model


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
    """How the base model of heads is called: the directory or repository that they lie in with it, or what they say."""
    return _base_name(directory, heads_directory(directory))


def _base_name(name: str | Path, directory: Path) -> str:
    if not (directory / "config.json").is_file():
        return str(describe(directory)["base"]["name"])
    return str(name) if is_hub_name(name) else str(directory)


def heads_directory(directory: str | Path, **fetching: Any) -> Path:
    """Where heads are: the shipped ones by the name of the bundled model, any other where the path says.

    Those in a repository of the hub (owner/name) are fetched, without the base that may lie beside them.

    Args:
        fetching: `revision`, `token`, `cache_dir`, `local_files_only` and `force_download` of huggingface_hub.

    Raises:
        FormatError: where the hub does not give the repository, or it has no heads.
    """
    if str(directory) == BUNDLED:
        return shipped_heads()
    if is_hub_name(directory):
        repository = fetched(str(directory), [f"{EXTRA}/*", "config.json"], **fetching)
        if not (repository / EXTRA / "config.json").is_file():
            raise FormatError(f"The repository {directory} holds no heads (there is no {EXTRA}/config.json in it).")
        return repository
    return Path(directory)


def load_base(
    name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """A plain causal language model from a path, a hub name, or the name of the bundled model.

    Args:
        dtype: default: as stored.
        trust_remote_code: run the code that the repository brings; else a model that needs it is refused.
        kwargs: passed on to AutoModelForCausalLM.from_pretrained.

    Raises:
        FormatError: where it is missing, broken or unsafe, or its weights are not those that its config describes.
    """
    path, fixed = find(name), {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if kwargs.get("use_safetensors", True) is not True:
        raise FormatError("use_safetensors=False would open pickles, which can run code; leave it out.")
    directory, is_local = _checked_directory(path, kwargs), Path(path).is_dir()
    if is_local:  # of a model of the hub, not all files may be here yet
        _check_contents(directory)
    with opening(f"The base model {name}"), _without_report():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **kwargs | fixed
        )
    base, info = loaded
    check_loaded(base, info, name)
    if not is_local:
        directory = _weights_directory(base, cache_dir=kwargs.get("cache_dir")) / kwargs.get("subfolder", "")
        _check_contents(directory)
    check_stored_types(base, sorted(directory.glob("*.safetensors")), name)
    _opened[base] = directory
    return base


def _checked_directory(path: str, settings: dict[str, Any]) -> Path:
    """The directory that a model is opened from, once the files that are in it already are checked.

    Args:
        settings: what `from_pretrained` gets; `revision`, `cache_dir` and `subfolder` count.
    """
    if path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise FormatError(f"There is no directory {path}: give that of a model, or a name on the hub.")
    directory = _directory(path, settings.get("revision"), settings.get("cache_dir")) / settings.get("subfolder", "")
    if directory.is_dir():
        check_directory(directory)
    return directory


def _check_contents(directory: Path) -> None:
    check_weights(directory)
    _check_generation_config(directory / "generation_config.json")


def load_config(name: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedConfig:
    """The config of a base model, from a path, a hub name, or the name of the bundled model.

    Args:
        trust_remote_code: run the code that the repository brings; else a config that needs it is refused.
        kwargs: passed on to AutoConfig.from_pretrained (`revision`, `cache_dir`, …).

    Raises:
        FormatError: where it is missing, broken or unsafe.
    """
    _checked_directory(path := find(name), kwargs)
    with opening(f"The config of {name}"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)


@contextmanager
def opening(what: str) -> Iterator[None]:
    """Turn whatever another library raises for a missing or damaged file into a FormatError of one sentence."""
    try:
        yield
    except FormatError:
        raise
    except Exception as error:  # also what tokenizers and configs raise, which have no types of their own
        if "trust_remote_code" in str(error):
            raise FormatError(
                f"{what} brings code of its own, which is not run: read it, and where you trust it give "
                "trust_remote_code=True (--trust-remote-code)."
            ) from None
        raise FormatError(f"{what} cannot be opened: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first line of what another library says, as the end of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".:") + "."


class _Report(python_logging.Filter):
    def filter(self, record: python_logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()


@contextmanager
def _without_report() -> Iterator[None]:
    """Leave out transformers' table of missing and unexpected weights: `check_loaded` says what is wrong."""

    log, report = logging.get_logger("transformers.modeling_utils"), _Report()
    log.addFilter(report)
    try:
        yield
    finally:
        log.removeFilter(report)


def _check_generation_config(path: Path) -> None:
    """Refuse a damaged generation config, which transformers drops without a word, its end tokens too."""
    if not path.is_file():
        return
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise FormatError(f"{path} is no JSON object; it is damaged.")
    stated = settings.get("eos_token_id")
    ends = [] if stated is None else stated if isinstance(stated, list) else [stated]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise FormatError(f"{path} has eos_token_id {stated!r}; expected a token id or a list of them.")


def heads_file(directory: str | Path) -> Path:
    """The tensors of the heads in a directory."""
    return Path(directory) / EXTRA / HEADS


def load_heads(model: MultiTokenModel, directory: str | Path) -> None:
    """Put the tensors of `directory`/nextn/heads.safetensors into the model's heads."""
    path = heads_file(directory)
    tensors = read_tensors(path)
    expected = model.heads.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys()) or sorted(
        name for name in expected if expected[name].shape != tensors[name].shape
    )
    if wrong:
        raise FormatError(f"{path} does not hold the heads that its config describes (first difference: {wrong[0]}).")
    model.heads.load_state_dict(tensors)


def load_adapters(base: PreTrainedModel, directory: str | Path) -> None:
    """Put the adapters that are saved beside the heads in a directory into their base; nothing where there are none.

    Raises:
        FormatError: without peft, for files that are missing or damaged, or where the base has other adapters already.
    """
    stated = describe(directory).get("adapters")
    if stated is None:
        return
    if adapter_layers(base):
        if not _has_adapters(base, directory, stated["names"]):
            raise FormatError(
                f"{directory} has adapters ({', '.join(stated['names'])}), and the base has other ones already; give "
                "the base without adapters."
            )
        return
    for name in stated["names"]:
        insert_adapter(base, name, _adapter_config(_adapter_file(directory, name).parent))
    read_adapters(base, directory)
    activate_adapters(base, stated["active"])


def read_adapters(base: PreTrainedModel, directory: str | Path) -> None:
    """Give the adapters of a model the tensors that are saved beside the heads in a directory.

    Raises:
        FormatError: where they are missing, damaged, or not those of the adapters.
    """
    for name in base.peft_config:
        path = _adapter_file(directory, name)
        tensors = read_tensors(path)
        try:
            set_adapter_tensors(base, name, tensors)
        except ValueError as error:
            raise FormatError(f"{path} does not hold the adapter that its config describes ({error}).") from None


def _has_adapters(base: PreTrainedModel, directory: str | Path, names: list[str]) -> bool:
    """Whether the adapters of a model are the saved ones."""
    if sorted(base.peft_config) != names:
        return False
    for name in names:
        stored, own = read_tensors(_adapter_file(directory, name)), adapter_tensors(base, name)
        if stored.keys() != own.keys() or not all(torch.equal(stored[key], own[key].cpu()) for key in own):
            return False
    return True


def _adapter_file(directory: str | Path, name: str) -> Path:
    return Path(directory) / EXTRA / ADAPTERS / Path(name).name / "adapter_model.safetensors"


def _adapter_config(path: Path) -> Any:
    try:
        from peft import PeftConfig
    except ImportError:
        raise FormatError(f"{path} is an adapter, and needs peft: pip install 'nextn[lora]'.") from None
    if not (path / "adapter_config.json").is_file():  # peft would look for it on the hub
        raise FormatError(f"There is no {path / 'adapter_config.json'}; the adapter is missing.")
    try:
        return PeftConfig.from_pretrained(str(path))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path / 'adapter_config.json'} cannot be read: {_reason(error)}") from None


@reading()
def describe(directory: str | Path) -> dict[str, Any]:
    """The description of the heads in a directory, from `nextn/config.json`."""
    path = Path(directory) / EXTRA / "config.json"
    if not path.is_file():
        raise FormatError(f"{directory} holds no heads (there is no {path}).")
    check_directory(directory)
    description = read_json(path, limit=2**20)
    try:
        description["multi_token"]["n"], description["format"]
        [description["base"][key] for key in ("name", "architecture", "hash", "vocab_size", "hidden_size")]
    except (KeyError, TypeError):
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
        raise FormatError(f"There is no {path}; part of the model is missing.")
    check_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path} cannot be read ({error}); it is truncated or damaged. Save it again.") from None


def _check_fit(stated: dict[str, Any], base: PreTrainedModel, cache_dir: str | Path | None) -> None:
    weight = base.get_output_embeddings().weight
    for what, have in (("vocab_size", weight.shape[0]), ("hidden_size", weight.shape[1])):
        if stated[what] != have:
            raise FormatError(
                f"The heads were made for a base with {what} {stated[what]}, but this one has {have}; "
                f"use the base {stated['name']}."
            )
    if stated["hash"] != hash_of(base, cache_dir=cache_dir):
        logger.warning(
            "The base model is not the one that the heads were trained on: its weights are others, stored in another "
            "dtype, or were changed after loading (its hash differs). Decoding stays lossless; acceptance may be lower."
        )


def _check_active_adapters(description: dict[str, Any], base: PreTrainedModel) -> None:
    """Warn of a base that computes with other adapters than the heads were trained with."""
    if is_merged(base):  # then the hash of its weights tells
        return
    stated, active = description.get("adapters", {}).get("active", []), active_adapters(base)
    if sorted(stated) != sorted(active):
        logger.warning(
            f"The base computes with the adapters {', '.join(active) or 'none'}, but the heads were trained with "
            f"{', '.join(stated) or 'none'}: decoding stays lossless, but acceptance may be lower."
        )


def open_for_decoding(
    name: str,
    heads: int | None = None,
    dtype: str = "auto",
    rows: int = 1,
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[Engine, PreTrainedTokenizerBase]:
    """An engine and its tokenizer, from a directory with heads or, with heads=1, from any causal model.

    Args:
        heads: None for all heads, 1 for the plain model alone.
        dtype: `auto` (as stored), `float32` or `bfloat16`.
        rows: how many prompts are decoded side by side.
        trust_remote_code: run the code that the base's repository brings; else such a base is refused.
        settings: of `Engine`: `keep`, and where there are heads `depth` and `tree`.
    """
    trunk_dtype = None if dtype == "auto" else named_dtype(dtype)
    if heads not in (None, 1):
        raise FormatError(f"--heads is {heads}; give 1 for the plain model, or leave it out for all heads.")
    if heads == 1:
        plain = base_of(name) if has_heads(name) else name
        base = load_base(plain, trunk_dtype, trust_remote_code).eval()
        if has_heads(name):
            load_adapters(base, heads_directory(name))
        engine = Engine(Trunk(base), None, rows, end_tokens(base), **settings)
    else:
        model = load(name, dtype=trunk_dtype, trust_remote_code=trust_remote_code)
        engine = model.engine(rows, **settings)
    tokenizer = load_tokenizer(plain, trust_remote_code) if heads == 1 else tokenizer_of(name, trust_remote_code)
    return engine, tokenizer


def tokenizer_of(directory: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the base that heads were trained on.

    Raises:
        FormatError: where it cannot be opened, or is not the one that the heads were trained with.
    """
    tokenizer = load_tokenizer(base_of(directory), trust_remote_code)
    check_tokenizer(directory, tokenizer)
    return tokenizer


def check_tokenizer(directory: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that is not the one that the heads in a directory were trained with.

    Another chat template is a warning.

    Raises:
        FormatError: for another vocabulary, or no chat template where there was one.
    """
    stated = describe(heads_directory(directory))["base"]
    if stated.get("tokenizer") not in (None, hash_of_tokenizer(tokenizer)):
        raise FormatError(
            f"The heads in {directory} were trained with another tokenizer than {tokenizer.name_or_path} has; "
            "use the base that they name."
        )
    template = hash_of_template(tokenizer)
    if stated.get("chat_template") not in (None, template):
        if template is None:
            raise FormatError(
                f"The heads in {directory} were trained with a chat template, but the tokenizer of "
                f"{tokenizer.name_or_path} has none; restore its chat_template.jinja, or use the base that they name."
            )
        logger.warning(
            f"The chat template of {tokenizer.name_or_path} is not the one that the heads were trained with. "
            "Decoding stays lossless; acceptance may be lower."
        )


def named_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as a dtype."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@reading()
def has_heads(directory: str | Path) -> bool:
    """Whether a directory, or a repository of the hub, has heads in our layout."""
    try:
        directory = heads_directory(directory) if is_hub_name(directory) else directory
    except FormatError:  # the base of that name is what cannot be opened then
        return False
    return (Path(directory) / EXTRA / "config.json").is_file()


def load_tokenizer(name: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, from a path or a hub name.

    Args:
        trust_remote_code: run the code that the repository brings; else a tokenizer that needs it is refused.
        kwargs: passed on to AutoTokenizer.from_pretrained (`revision`, `cache_dir`, …).

    Raises:
        FormatError: where it is missing, broken or unsafe.
    """
    _checked_directory(path := find(name), kwargs)
    with opening(f"The tokenizer of {name}"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)


def contents(directory: str | Path) -> dict[str, Any]:
    """What a directory holds: base, hash, heads, and parameters and bytes of each part of the heads."""
    directory = heads_directory(directory)
    description = describe(directory)
    check_weights(directory)
    tensors = read_tensors(heads_file(directory))
    parts: dict[str, dict[str, int]] = {}
    plain = sorted(directory.glob("*.safetensors"))
    if plain:
        parts["plain model"] = _size(tensor for _, tensor in _stored(plain))
    for name in description.get("adapters", {}).get("names", []):
        parts[f"adapter {name}"] = _size(read_tensors(_adapter_file(directory, name)).values())
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
    tensors = list(tensors)
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    }
