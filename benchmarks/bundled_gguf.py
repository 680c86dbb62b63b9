"""The bundled model as GGUF files of several types, so that llama.cpp can be measured beside nextn.

    python benchmarks/bundled_gguf.py --out gguf

The package holds Q4_1, which the bundled model was dequantised from. The same dequantised weights are written as F32
(the very model that nextn runs), F16, Q8_0 and Q4_0 (all matrices, the token table too), with the metadata and the
tokenizer of the original.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import gguf
import typer
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, LlamaFileType
from rich.progress import track

from nextn.formats.bundled import fetch

FILE_TYPES = {
    Type.F32: LlamaFileType.ALL_F32,
    Type.F16: LlamaFileType.MOSTLY_F16,
    Type.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: LlamaFileType.MOSTLY_Q4_0,
}


def write(reader: GGUFReader, kind: Type, path: Path) -> None:
    """The model of `reader` with its matrices as `kind`; vectors stay float32."""
    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        if name == "general.quantization_version":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            continue
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(FILE_TYPES[kind])
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        stored = kind if weights.ndim > 1 else Type.F32
        writer.add_tensor(tensor.name, gguf.quantize(weights, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(out: Annotated[Path, typer.Option(help="Where the files go.")]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        reader = GGUFReader(fetch(Path(temporary)))
        for kind in track(FILE_TYPES, description="writing"):
            write(reader, kind, out / f"smollm2-135m-instruct-{kind.name}.gguf")


if __name__ == "__main__":
    typer.run(main)
