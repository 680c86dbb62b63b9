"""The step as machine code.

A module that is a function of tensors (`Verify`, `Draft`) is exported from the host's own forward by torch.export and
compiled ahead of time by AOTInductor: weights frozen into the layout that their kernels read, matrix products for a
few rows chosen by measuring, no Python and no guards at run time. What comes out is kept on disk, and the next process
loads it in about a second.

On a GPU what is exported goes to torch.compile instead: it leaves the weights where they are, of which a package would
hold a copy for each number of drafts. PyTorch keeps the kernels on disk, and a step is replayed as a CUDA graph.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import transformers
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn
from torch.utils._pytree import tree_map

import nextn.config
from nextn.digest import code_of, structure_of, weights_of
from nextn.lock import LockedError
from nextn.store import Store
from nextn.trunk import BLOCK

LARGE = 10**9  # bytes of a package whose check may take two seconds
Progress = Callable[[str], AbstractContextManager[Any]]

# Inductor's own products for a few rows want constant weights, hence freezing. Measuring them against the library's
# would double the time to compile.
_CPU = {"freezing": True, "max_autotune_gemm": True, "max_autotune_gemm_backends": "CPP",
        "cpp.enable_concat_linear": True}  # fmt: skip


class CompileError(RuntimeError):
    """Nothing can be compiled here, or not this; the message says why."""


@contextmanager
def on_stderr(message: str) -> Iterator[None]:
    """A line with a spinner and the time that has passed."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        bar.add_task(message, total=None)
        yield


def compiled(module: nn.Module, inputs: tuple[Any, ...], progress: Progress = on_stderr) -> Callable[..., Any]:
    """The same function as `module`, compiled, for inputs of these shapes; compiled once a machine.

    Args:
        module: `Verify`, `Draft`, `Draw`. Its weights must not change afterwards: on a CPU what is compiled has a copy.
        inputs: an example; where caches are read the last two are `seen` [S] and `buffers`, pairs of [B, H, C, Dk],
            whose S, a multiple of `BLOCK`, and C may vary.
        progress: shown while it compiles; called with a message, gives a context.

    Raises:
        CompileError: without a C++ compiler, or where the host's forward cannot be exported.
    """
    name = type(module).__name__.lower()
    if inputs[0].device.type == "cuda":
        with progress(f"compiling {name} (a minute or two)"):
            return Graphed(_in_memory(module, inputs))
    name = f"{name}-{key(module, inputs)}"
    package = _loaded.get(name)
    if package is None:
        package = _loaded[name] = _load(_package_file(module, inputs, name, progress))
    return _flat(package)


_loaded: WeakValueDictionary[str, Any] = WeakValueDictionary()  # a package is as large as the weights: once is enough


def package_directory() -> Path:
    """Where compiled packages are kept."""
    return nextn.config.cache_directory() / "compiled"


def _package_file(module: nn.Module, inputs: tuple[Any, ...], name: str, progress: Progress) -> Path:
    """The intact package of a name, compiled where there is none.

    Raises:
        CompileError: without a compiler, or where the directory of packages cannot be used.
    """
    packages, kind = Store(package_directory(), ".pt2"), type(module).__name__.lower()
    try:
        with progress(f"checking {kind}") if packages.size(name) > LARGE else nullcontext():
            path = packages.get(name)
        if path is not None:
            return path
        require_compiler()
        with progress(f"compiling {kind} (a minute or two; kept for the next time)"):
            return packages.make(name, lambda path: _package(module, inputs, path))
    except OSError as error:
        raise CompileError(f"{package_directory()} cannot be used ({_first_line(error)})") from None
    except LockedError as error:
        raise CompileError(_first_line(error)) from None


def _in_memory(module: nn.Module, inputs: tuple[Any, ...]) -> Callable[..., Any]:
    """Compiled by torch.compile, for good: S and C may vary, and nothing of it is compiled again."""
    require_compiler()
    with _one_error(module), torch.no_grad():
        function = torch.compile(_exported(module, inputs).module(check_guards=False), fullgraph=True)
        with torch.inference_mode():  # a first call in the mode, and with the kind of tensors, of all later ones
            *fixed, seen, buffers = tree_map(torch.clone, inputs)
            for tensor, place in ((seen, 0), *((part, 2) for pair in buffers for part in pair)):
                torch._dynamo.mark_dynamic(tensor, place)
            function(*fixed, seen, buffers)
    return function


def _package(module: nn.Module, inputs: tuple[Any, ...], path: Path) -> None:
    """Export and compile to a path; what else the compiler writes goes to the same directory."""
    scratch = torch._inductor.utils.fresh_cache(dir=str(path.parent))
    with _one_error(module), torch.no_grad(), _quiet_autotuning(), scratch:
        program = _exported(module, inputs)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=_CPU)


@contextmanager
def _one_error(module: nn.Module) -> Iterator[None]:
    """Export and compilers raise whatever they like; all of it means the same here."""
    try:
        yield
    except Exception as error:
        raise CompileError(f"{type(module).__name__} cannot be compiled: {_first_line(error)}") from error


def _exported(module: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    fixed, buffers = _parts(inputs)
    read, there = torch.export.Dim("read", min=1), torch.export.Dim("there", min=1)
    slots, capacity = BLOCK * read, BLOCK * there + 1
    of_caches = () if buffers is None else ({0: slots}, [({2: capacity}, {2: capacity})] * len(buffers))
    return torch.export.export(module, inputs, dynamic_shapes=(*[None] * len(fixed), *of_caches), strict=False)


def _parts(inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[tuple[torch.Tensor, torch.Tensor]] | None]:
    """The inputs of fixed shapes, and the buffers of the caches; None for what is not asked to read caches."""
    return (inputs[:-2], inputs[-1]) if isinstance(inputs[-1], list) else (inputs, None)


def _load(path: Path) -> Any:
    try:
        return torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise CompileError(f"{path} cannot be loaded: {_first_line(error)}") from None


def _flat(package: Any) -> Callable[..., Any]:
    """The loaded code takes a flat list; flattening by hand spares 0.2 ms a step of what its own wrapper takes."""

    def call(*inputs: Any) -> Any:
        if not isinstance(inputs[-1], list):
            return package.loader.run(list(inputs))
        *tensors, buffers = inputs
        return package.loader.run([*tensors, *(part for pair in buffers for part in pair)])

    return call


def key(module: nn.Module, inputs: tuple[Any, ...]) -> str:
    """A digest of all that the compiled code depends on: code, settings, weights, shapes, versions, machine."""
    trunk: Any = getattr(module, "trunk", None)
    fixed, buffers = _parts(inputs)
    parts = (
        torch.__version__,
        transformers.__version__,
        torch.get_float32_matmul_precision(),
        machine_name(inputs[0].device),
        code_of([__name__]),
        trunk.settings() if trunk else "",
        structure_of(module),
        weights_of(module),
        [(tuple(tensor.shape), tensor.dtype) for tensor in fixed],
        [(*pair[0].shape[:2], pair[0].shape[3], pair[1].shape[3], pair[0].dtype) for pair in buffers or []],
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def machine_name(device: torch.device) -> str:
    """The processor, or the accelerator, and how many threads work on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:  # compiled for this very processor: another one may not know its instructions
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    except OSError:
        processor = [platform.processor(), platform.machine()]
    return f"{processor} {torch.get_num_threads()}"


def recall(name: str) -> int | None:
    """A number that was measured on this machine before, if it was."""
    try:
        return int(Store(package_directory()).read(name) or b"")
    except (OSError, ValueError):
        return None


def remember(name: str, value: int) -> None:
    """Keep a measured number for the next process, where the directory can be written."""
    with suppress(OSError, LockedError):
        Store(package_directory()).put(name, str(value).encode())


def require_compiler() -> None:
    """Raise CompileError where there is no C++ compiler."""
    compiler = os.environ.get("CXX", "clang++" if platform.system() == "Darwin" else "g++")
    if shutil.which(compiler) is None:
        raise CompileError(f"there is no C++ compiler ({compiler}); install one, or name yours in $CXX")


@contextmanager
def _quiet_autotuning() -> Iterator[None]:
    """Without the table that Inductor prints for every product that it measures."""
    from torch._inductor import select_algorithm

    before, select_algorithm.PRINT_AUTOTUNE = select_algorithm.PRINT_AUTOTUNE, False
    try:
        yield
    finally:
        select_algorithm.PRINT_AUTOTUNE = before


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


class Graphed:
    """A function of tensors as a CUDA graph: one launch a step instead of hundreds. One graph an S.

    The addresses of the caches are part of a graph, so graphs are captured anew where caches are other ones. What a
    call returns is overwritten by the next one.

    Args:
        function: takes tensors of fixed shapes, then `seen` and `buffers`, see `compiled`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.places: list[tuple[int, torch.Size]] = []
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, tuple[Any, ...], Any]] = {}

    def __call__(self, *inputs: Any) -> Any:
        *fixed, seen, buffers = inputs
        places = [(part.data_ptr(), part.shape) for pair in buffers for part in pair]
        if self.places != places:
            self.places = places
            self.graphs.clear()
        if len(seen) not in self.graphs:
            self.graphs[len(seen)] = self._capture((*(tensor.clone() for tensor in fixed), seen, buffers))
        graph, held, outputs = self.graphs[len(seen)]
        for mine, given in zip(held, fixed, strict=False):
            mine.copy_(given)
        graph.replay()
        return outputs

    def _capture(self, held: tuple[Any, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Any, ...], Any]:
        self.function(*held)  # libraries allocate their workspaces in a first call, which may not be captured
        graph = torch.cuda.CUDAGraph()
        # Graphs of other lengths are replayed before and after, never meanwhile: they may share their memory.
        pool = next((other.pool() for other, _, _ in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            outputs = self.function(*held)
        return graph, held[:-1], outputs  # it reads its inputs where they were; caches belong to the engine
