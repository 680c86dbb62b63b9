"""The picture of the demonstration in the README.

python benchmarks/demo_picture.py docs/demo.svg
"""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console

import nextn
from nextn.evaluation.demo import demo
from nextn.formats.bundled import NAME, best_dtype, bundled_model
from nextn.formats.native import load_tokenizer


def main(picture: Path, figures: Path = Path("benchmarks/results/demo.json"), max_new_tokens: int = 64) -> None:
    console = Console(record=True, width=100)
    report = demo(nextn.load(NAME, dtype=best_dtype()), load_tokenizer(str(bundled_model())), console, max_new_tokens)
    console.save_svg(str(picture), title=f"nextn demo --max-new-tokens {max_new_tokens}")
    figures.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
