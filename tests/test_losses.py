"""The loss and its gradients against a plain slow reference in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import nextn
from conftest import KINDS, VOCAB, make_host
from nextn.losses import IGNORE, targets_at


def slow_loss(model, ids, labels, documents, positions, denominator=None):
    """Position by position, depth by depth, straight from the definition."""
    weights = model.multi_token.weights.by_depth(model.multi_token.n)
    text = nextn.model.Text(ids, positions, documents)
    hidden, tapped = model.trunk.run(ids, positions, text.visible(), tap=model.heads.tap)
    states = [hidden, *model.heads(model.trunk, tapped, text)]
    total, count = 0.0, 0
    for row in range(ids.shape[0]):
        for t in range(ids.shape[1]):
            for k in range(1, model.multi_token.n + 1):
                if t + k >= ids.shape[1] or labels[row, t + k] == IGNORE or documents[row, t] < 0:
                    continue
                if documents[row, t] != documents[row, t + k]:
                    continue
                count += k == 1
                logits = model.trunk.unembedding(states[k - 1][row, t])
                total = total - weights[k - 1] * logits.log_softmax(-1)[labels[row, t + k]]
    return total / (denominator or count)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_loss_and_gradients_equal_the_slow_reference(kind, frozen):
    config = nextn.MultiTokenConfig(
        n=4, freeze_trunk=frozen, weights={"preset": "list", "values": [0.5, 1.0, 0.7, 0.3]}, **KINDS[kind]
    )
    model = nextn.attach(make_host("llama").double(), config)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 14), generator=generator)
    labels = ids.clone()
    labels[0, 3:5] = IGNORE
    labels[1, 11:] = IGNORE
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    positions = torch.cat([torch.arange(6), torch.arange(8)]).expand(2, -1)
    documents = torch.where(mask > 0, (positions == 0).long().cumsum(1), -1)

    twin = copy.deepcopy(model)
    model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss.backward()
    reference = slow_loss(twin, ids, labels, documents, positions)
    reference.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9, msg=name)
    torch.testing.assert_close(
        model(ids, attention_mask=mask, position_ids=positions, labels=labels).loss,
        reference.detach(),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_packed_padded_and_accumulated_give_one_loss(kind):
    model = nextn.attach(make_host("gemma3"), nextn.MultiTokenConfig(n=3, **KINDS[kind]))
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(3, VOCAB, (length,), generator=generator) for length in (20, 11)]
    items = sum(len(document) - 1 for document in documents)

    alone = sum(model(d[None], labels=d[None], num_items_in_batch=items).loss for d in documents)
    packed = torch.cat(documents)[None]
    places = torch.cat([torch.arange(len(document)) for document in documents])[None]
    torch.testing.assert_close(model(packed, position_ids=places, labels=packed).loss, alone, rtol=1e-4, atol=1e-4)
    for side in ("right", "left"):
        ids, mask = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 20, dtype=torch.long)
        for row, document in enumerate(documents):
            where = slice(0, len(document)) if side == "right" else slice(20 - len(document), 20)
            ids[row, where], mask[row, where] = document, 1
        labels = torch.where(mask > 0, ids, IGNORE)
        padded = model(ids, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


def test_targets_respect_borders_and_masks():
    labels = torch.tensor([[10, 11, IGNORE, 13, 14, 15]])
    documents = torch.tensor([[1, 1, 1, 2, 2, -1]])
    assert targets_at(labels, documents, 1).tolist() == [[11, IGNORE, IGNORE, 14, IGNORE, IGNORE]]
    assert targets_at(labels, documents, 2).tolist() == [[IGNORE] * 6]
    assert targets_at(labels, documents, 9).tolist() == [[IGNORE] * 6]
