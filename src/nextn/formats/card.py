"""The model card of a saved model: the README.md that the hub shows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from yaml import YAMLError

from nextn.config import MultiTokenConfig
from nextn.formats.bundled import NAME as BUNDLED
from nextn.formats.hub import is_hub_name

TAGS = ("nextn", "multi-token-prediction")
FILE = "README.md"


def card(
    description: dict[str, Any],
    is_whole: bool,
    repository: str | None = None,
    tags: Iterable[str] = (),
    online: bool = False,
) -> ModelCard:
    """The card of a model with heads, or of heads alone.

    Args:
        description: of the heads, as `nextn/config.json` has it.
        is_whole: whether the base lies beside the heads.
        repository: where it will be on the hub.
        tags: beside those of nextn.
        online: look on the hub for the licence of the base.
    """
    base = description["base"]["name"]
    data = ModelCardData(
        library_name="nextn",
        pipeline_tag="text-generation",
        tags=[*TAGS, *tags],
        base_model=base if is_hub_name(base) and base != repository else None,
        license=_license_of(base, online),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(description, is_whole, repository)}")


def _text(description: dict[str, Any], is_whole: bool, repository: str | None) -> str:
    config = MultiTokenConfig(**description["multi_token"])
    base = description["base"]
    shown = base["name"] if is_hub_name(base["name"]) or base["name"] == BUNDLED else Path(base["name"]).name
    named = f"{shown} ({base['architecture']})" if shown and shown != repository else base["architecture"]
    rows = {
        "base": named,
        "tokens predicted (n)": f"{config.n}: the next token and {config.n - 1} drafts" if config.n > 1 else "1",
        "heads": config.kind,
        "output": str(config.output),
    }
    if "adapters" in description:
        rows["adapters"] = ", ".join(description["adapters"]["names"])
    if description.get("held_out_tau"):
        rows["τ on held-out text"] = f"{description['held_out_tau']:.2f} tokens per step"
    what = "A causal language model with multi-token prediction heads" if is_whole else "Multi-token prediction heads"
    made = (
        f"{what}, made with nextn. The heads draft tokens that the base model verifies: decoding is faster, and its "
        "text is that of the base model."
    )
    if config.n == 1:
        made = "A causal language model without heads, trained with nextn to predict the next token alone."
    title = (repository or shown).split("/")[-1] or base["architecture"]
    lines = [
        f"# {title if is_whole or repository else f'{title} heads'}",
        "",
        made,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## How to load",
        "",
        "```python",
        "import nextn",
        "from transformers import AutoTokenizer",
        "",
        f'model = nextn.load("{repository or "DIRECTORY"}")',
        "tokenizer = AutoTokenizer.from_pretrained(model.base.config._name_or_path)",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```",
    ]
    if is_whole:
        lines += ["", "Without nextn, transformers opens it as the plain model."]
    if "adapters" in description:
        lines += ["", "The adapters are in `nextn/adapters/`, as peft writes them."]
    return "\n".join(lines) + "\n"


def tagged(existing: ModelCard, tags: Iterable[str]) -> ModelCard:
    """A card that somebody wrote, with the tags of nextn."""
    own = existing.data.get("tags") or []
    existing.data["tags"] = [*own, *(tag for tag in (*TAGS, *tags) if tag not in own)]
    return existing


def _license_of(base: str, online: bool) -> str | None:
    """The licence that the card of a base names, where there is one at hand."""
    if base == BUNDLED:
        return "apache-2.0"
    try:
        if not is_hub_name(base):
            path: Any = Path(base) / FILE if base else None  # without a name it was made in memory
        else:
            path = hf_hub_download(base, FILE) if online else try_to_load_from_cache(base, FILE)
        metadata = metadata_load(path) if isinstance(path, (str, Path)) else None
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError, YAMLError):
        return None
    return metadata.get("license") if metadata else None
