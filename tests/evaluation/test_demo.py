"""What the demonstration and the page show of a text is what the tokenizer decodes."""

from __future__ import annotations

import html
import io
import re

import pytest
from rich.console import Console

from nextn.data import byte_tokenizer
from nextn.evaluation.demo import ColourStream
from nextn.evaluation.page import sample


@pytest.mark.parametrize("length", range(1, 9))
def test_the_demo_and_the_page_show_a_character_that_the_length_cuts(length):
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a <é😀")["input_ids"][:length]
    origins = [place % 3 for place in range(length)]
    out = io.StringIO()
    stream = ColourStream(tokenizer, Console(file=out, width=80))
    stream(0, tokens, origins)
    stream.end()
    assert out.getvalue() == tokenizer.decode(tokens) + "\n"

    shown = sample({"sample": {"prompt": "p", "tokens": tokens, "origins": origins}, "n": 3}, tokenizer)
    text = re.sub("<[^>]*>", "", shown.split('<div class="text">')[1])
    assert html.unescape(text) == tokenizer.decode(tokens)
