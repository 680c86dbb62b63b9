"""Digests of modules, as keys for what is kept of them on disk: their code, settings and weights."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

# Attributes that change no result of a forward: where a model came from, how it generates, what was warned of.
_NO_SETTINGS = {"name_or_path", "_name_or_path", "generation_config", "warnings_issued", "transformers_version"}
_TENSORS = {"_parameters", "_buffers", "_modules"}
_KNOWN_BY_VERSION = ("torch", "transformers")


def weights_of(module: nn.Module) -> str:
    """A digest of all parameters and buffers: names, shapes, dtypes, values as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Update a digest with the name, shape, dtype and bytes of a tensor.

    Saved heads hold hashes in this format: a change would make all of them differ from their base.
    """
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    digest.update(_bytes(tensor))


def shapes_of(module: nn.Module) -> str:
    """A digest of the names, shapes and dtypes of all parameters and buffers."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    text = repr([(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors])
    return hashlib.sha256(text.encode()).hexdigest()


def structure_of(module: nn.Module) -> str:
    """A digest of what decides a module's results beside its tensors.

    These are the classes of it and of all its parts, the files that they come from, their forwards where these were
    replaced, hooks, and attributes: active adapters, for example. Of an object that is neither data nor a function,
    only the class counts.
    """
    digest, sources, known = hashlib.sha256(), set[str](), dict[int, Any]()
    for name, part in module.named_modules():
        sources.update(each.__module__ for each in type(part).__mro__)
        attributes = {
            key: _described(value, known)
            for key, value in vars(part).items()
            if key not in _NO_SETTINGS and key not in _TENSORS
        }
        stated = [name, _described(type(part), known), _described(type(part).forward, known), attributes]
        digest.update(json.dumps(stated, sort_keys=True).encode())
    digest.update(code_of(sources).encode())
    return digest.hexdigest()


def code_of(modules: Iterable[str]) -> str:
    """A digest of the source files of Python modules and of all that they import from their own packages."""
    names = set[str]().union(*(_with_imports(name) for name in modules))
    return hashlib.sha256(repr([(name, _source(name)) for name in sorted(names)]).encode()).hexdigest()


@functools.cache
def _with_imports(name: str) -> frozenset[str]:
    package, names, left = name.partition(".")[0], set[str](), [name]
    if package in _KNOWN_BY_VERSION:
        return frozenset({name})
    while left:
        current = left.pop()
        if current in names or current not in sys.modules:
            continue
        names.add(current)
        for value in list(vars(sys.modules[current]).values()):
            other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(other, str) and other.startswith(f"{package}."):
                left.append(other)
    return frozenset(names)


@functools.cache
def _source(name: str) -> str:
    """A digest of a Python module's file; empty where it has none, as in a notebook."""
    try:
        return hashlib.sha256(Path(str(sys.modules[name].__file__)).read_bytes()).hexdigest()
    except (AttributeError, KeyError, OSError):
        return ""


def _described(value: Any, known: dict[int, Any]) -> Any:
    """A value as JSON has it, equal in all processes; objects that are no data by their class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, OrderedDict):  # hooks, whose keys are other numbers in each process
        return [_described(item, known) for item in value.values()]
    if isinstance(value, dict):
        items = [[str(key), _described(item, known)] for key, item in value.items() if key not in _NO_SETTINGS]
        return sorted(items, key=str)
    if isinstance(value, list | tuple):
        return [_described(item, known) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_described(item, known) for item in value), key=str)
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return str(value)
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype), hashlib.sha256(_bytes(value)).hexdigest()]
    if isinstance(value, functools.partial):
        return [_described(item, known) for item in (value.func, value.args, value.keywords)]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, MethodType):
        return _described(value.__func__, known)
    if isinstance(value, FunctionType | BuiltinFunctionType):
        function = inspect.unwrap(value)
        return [function.__module__, function.__qualname__, _described_code(getattr(function, "__code__", None))]
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    if hasattr(value, "to_dict") and not isinstance(value, nn.Module):  # a config, which many parts share
        if id(value) not in known:
            known[id(value)] = _described(value.to_dict(), known)
        return known[id(value)]
    return _described(type(value), known)


def _described_code(code: CodeType | None) -> str:
    if code is None:
        return ""
    constants = [
        _described_code(item) if isinstance(item, CodeType) else sorted(map(repr, item)) if isinstance(item, frozenset)
        else repr(item)
        for item in code.co_consts
    ]  # fmt: skip
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()


def _bytes(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return b""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
