"""The efficient embedder of Gemma 4's assistants (E2B, E4B): our clustered outputs in their layout, and theirs in ours.

In an assistant's directory: `masked_embedding.centroids.weight` [C, d], `masked_embedding.token_ordering` [V], and the
rows, `model.embed_tokens.weight` [V, d], which its unembedding is tied to; in its config `use_ordered_embeddings`,
`num_centroids` and `centroid_intermediate_top_k`. One thing differs beside the layout: transformers fills the logits
of tokens that were not scored with the smallest logit minus 1, which leaves them some probability; ours have none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nextn.config import OutputConfig
from nextn.files import replacing, write_json
from nextn.formats import FormatError
from nextn.formats.checks import check_directory, read_json
from nextn.formats.native import read_tensors, writable
from nextn.output import ClusteredOutput

_NAMES = {
    "centroids.weight": "masked_embedding.centroids.weight",
    "token_ordering": "masked_embedding.token_ordering",
    "table.weight": "model.embed_tokens.weight",
}


def read_output(directory: str | Path) -> tuple[OutputConfig, dict[str, Tensor]]:
    """The efficient embedder of an assistant: the config of an output with rows of its own, and its tensors.

    `heads.output.load_state_dict(tensors)` takes them, where heads are as wide as the assistant.

    Raises:
        FormatError: where there is none, or it does not fit together.
    """
    directory = Path(directory)
    settings = _settings(directory)
    if not settings.get("use_ordered_embeddings"):
        raise FormatError(f"{directory} has no ordered embeddings; its output is the plain table of a `separate` one.")
    stored = read_tensors(directory / "model.safetensors")
    if missing := [name for name in _NAMES.values() if name not in stored]:
        raise FormatError(f"{directory / 'model.safetensors'} has no {missing[0]}; it is no Gemma 4 assistant's.")
    tensors = {ours: stored[theirs] for ours, theirs in _NAMES.items()}
    clusters, vocabulary = len(tensors["centroids.weight"]), len(tensors["table.weight"])
    ordering = tensors["token_ordering"].long()
    whole = len(ordering) == vocabulary and ordering.sort().values.equal(torch.arange(vocabulary))
    top = settings.get("centroid_intermediate_top_k")
    fits = settings.get("num_centroids") == clusters and isinstance(top, int) and 1 <= top <= clusters
    if not (fits and whole and vocabulary % clusters == 0):
        raise FormatError(f"{directory}: centroids, token ordering and config do not fit together; a file is damaged.")
    config = OutputConfig(kind="clustered", clusters=clusters, top_clusters=top, own=True)
    return config, tensors | {"token_ordering": ordering.int()}


def write_output(output: ClusteredOutput, directory: str | Path) -> None:
    """Write an output with rows of its own into an assistant's directory; whatever else it holds stays.

    Raises:
        FormatError: for an output that takes the trunk's rows, which an assistant cannot.
    """
    if output.table is None:
        raise FormatError("An assistant has rows of its own: compress to a clustered output with --own first.")
    directory = writable(directory)
    weights = directory / "model.safetensors"
    tensors = read_tensors(weights) if weights.is_file() else {}
    ours = output.state_dict()
    tensors |= {theirs: ours[name].contiguous().cpu() for name, theirs in _NAMES.items()}
    tensors[_NAMES["token_ordering"]] = tensors[_NAMES["token_ordering"]].long()
    settings = _settings(directory) if (directory / "config.json").is_file() else {"model_type": "gemma4_assistant"}
    with replacing(weights) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    settings |= {
        "use_ordered_embeddings": True,
        "num_centroids": len(output.centroids.weight),
        "centroid_intermediate_top_k": output.top,
    }
    write_json(directory / "config.json", settings)


def _settings(directory: Path) -> dict[str, Any]:
    check_directory(directory)
    settings = read_json(path := directory / "config.json")
    if not isinstance(settings, dict):
        raise FormatError(f"{path} is no JSON object; it is damaged.")
    return settings
