"""Our clustered outputs in the layout of Gemma 4's assistants: transformers' own module scores the same tokens."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.gemma4_assistant.modeling_gemma4_assistant import Gemma4AssistantMaskedEmbedder

from conftest import VOCAB, make_host
from nextn.config import OutputConfig
from nextn.formats import FormatError, gemma4
from nextn.output import build_output
from nextn.trunk import Trunk

TRUNK = Trunk(make_host("llama"))


def fitted(stated="clustered:8:3,own"):
    torch.manual_seed(0)
    output = build_output(OutputConfig.parse(stated), TRUNK)
    output.fit(TRUNK.unembedding.weight)
    return output


def test_transformers_scores_the_same_tokens(tmp_path):
    output = fitted()
    gemma4.write_output(output, tmp_path)
    stored, settings = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    # Gemma4AssistantConfig cannot be made in transformers 5.23, whose check of its own defaults fails.
    shape = SimpleNamespace(hidden_size=TRUNK.width, vocab_size=VOCAB)
    theirs = Gemma4AssistantMaskedEmbedder(SimpleNamespace(get_text_config=lambda: shape, **settings))
    prefix = "masked_embedding."
    theirs.load_state_dict({name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)})
    states = torch.randn(2, 3, TRUNK.width)
    expected, ours = theirs(states, stored["model.embed_tokens.weight"]), output(TRUNK, states)
    named = ours > -torch.inf
    torch.testing.assert_close(ours[named], expected[named])
    # What they fill in is below all that was scored, and still has some probability; ours has none.
    assert expected[~named].max() < expected[named].min()
    assert expected.softmax(-1)[~named].min() > 0 and ours.softmax(-1)[~named].max() == 0


def test_what_was_written_is_read_and_the_rest_stays(tmp_path):
    save_file({"post_projection.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"backbone_hidden_size": 1536}))
    output = fitted()
    gemma4.write_output(output, tmp_path)
    assert "post_projection.weight" in load_file(tmp_path / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["backbone_hidden_size"] == 1536
    config, tensors = gemma4.read_output(tmp_path)
    assert str(config) == "clustered:8:3,own"
    again = build_output(config, TRUNK)
    again.load_state_dict(tensors)
    states = torch.randn(4, TRUNK.width)
    assert torch.equal(again(TRUNK, states), output(TRUNK, states))


def test_what_does_not_fit_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(FormatError, match="rows of its own"):
        gemma4.write_output(fitted("clustered:8:3"), tmp_path)
    with pytest.raises(FormatError, match="cannot be read"):
        gemma4.read_output(tmp_path)
    gemma4.write_output(fitted(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"num_centroids": 4}, "do not fit together"),
        ({"use_ordered_embeddings": False}, "plain"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(FormatError, match=message):
            gemma4.read_output(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match="is no JSON object"):
        gemma4.read_output(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("masked_embedding.token_ordering")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match=r"has no masked_embedding\.token_ordering"):
        gemma4.read_output(tmp_path)
