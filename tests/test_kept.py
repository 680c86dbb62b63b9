from __future__ import annotations

import pytest
import torch

import nextn
from conftest import make_host, with_lora
from nextn import kept
from nextn.data import PackedBlocks

TOP_K = 5
PARTS = ("input_ids", "attention_mask", "position_ids")


@pytest.fixture
def blocks():
    texts = torch.randint(3, 60, (7, 15)).tolist()
    return PackedBlocks([(ids, ids) for ids in texts], 16, pad_id=0)


def build(tap="pre_norm", **more):
    torch.manual_seed(0)
    return nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3, recurrent=True, tap=tap, **more))


def test_outputs_are_kept_in_shards_and_computed_once(blocks, tmp_path, monkeypatch):
    model, length = build(), blocks.length
    monkeypatch.setattr(kept, "SHARD", 2 * length * model.heads.hidden_width * 4)  # two blocks
    data = kept.KeptOutputs(blocks, model, TOP_K, tmp_path)
    assert len(list(tmp_path.glob("trunk_outputs-*/trunk_states-*.bin"))) == -(-len(blocks) // 2)
    expected = [
        model.trunk_outputs(*(blocks[i][key][None] for key in ("input_ids", "attention_mask", "position_ids")), TOP_K)
        for i in range(len(blocks))
    ]
    for _ in range(2):
        for index in torch.randperm(len(blocks)).tolist():
            item = data[index]
            assert torch.equal(item["input_ids"], blocks[index]["input_ids"])
            for name, tensor in expected[index].items():
                assert torch.equal(item[name], tensor[0]), name
        monkeypatch.setattr(model.trunk, "run", None)  # the trunk is not needed any more
    again = kept.KeptOutputs(blocks, model, TOP_K, tmp_path)
    assert torch.equal(again[3]["trunk_states"], expected[3]["trunk_states"][0]), "nor by a resumed training"


def test_the_size_is_told_before(blocks, tmp_path):
    model = build()
    data = kept.KeptOutputs(blocks, model, TOP_K, tmp_path)
    for index in range(len(blocks)):
        data[index]
        assert kept.KeptOutputs.bytes_there(tmp_path) > 0
    written = sum(file.stat().st_size for file in tmp_path.glob("*/*.bin"))
    assert written == kept.KeptOutputs.bytes_needed(blocks, model, TOP_K)
    kept.KeptOutputs.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_another_tap_or_text_kept_is_not_taken(blocks, tmp_path):
    for tap in ("pre_norm", "post_norm"):
        kept.KeptOutputs(blocks, build(tap), 0, tmp_path)[0]
    kept.KeptOutputs(blocks.part([1, 0]), build(), 0, tmp_path)[0]
    kept.KeptOutputs(blocks, build(), TOP_K, tmp_path)[0]
    warm = build(objective={"follows": "kl", "temperature": 2.0})
    kept.KeptOutputs(blocks, warm, TOP_K, tmp_path)[0]
    assert len(list(tmp_path.iterdir())) == 5


def test_what_other_weights_or_adapters_gave_is_not_taken(blocks, tmp_path, trained_host):
    """Of one base on the disk, which is not the one in memory."""
    trained_host.save_pretrained(tmp_path / "base")

    def states(change):
        base = nextn.formats.native.load_base(str(tmp_path / "base"))
        change(base)
        model = nextn.attach(base, nextn.MultiTokenConfig(n=3, heads="parallel", head="linear"))
        data = kept.KeptOutputs(blocks, model, 0, tmp_path / "kept")
        return data[0]["trunk_states"].clone(), model.trunk_outputs(*(blocks[0][key][None] for key in PARTS), 0)

    def edit(base):
        base.model.layers[0].mlp.up_proj.weight.data.mul_(2)

    def disable(base):
        with_lora(base, enabled=False)

    changes = [lambda base: None, edit, with_lora, disable]
    found = [states(change) for change in changes]
    for stored, fresh in found:
        assert torch.equal(stored, fresh["trunk_states"][0])
    assert len(list((tmp_path / "kept").iterdir())) == len(changes)
    assert not torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][0], found[2][0])
