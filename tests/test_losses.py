"""The loss and its gradients against a plain slow reference in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import nextn
from conftest import MORE_KINDS, VOCAB, make_host
from nextn.config import ObjectiveConfig, OutputConfig, ScheduleConfig
from nextn.losses import IGNORE, Depth, depth_losses, targets_at
from nextn.output import SharedOutput, TrimmedOutput
from nextn.teachers import TopTokens, TrunkStates
from nextn.trunk import Trunk


def slow_loss(model, ids, labels, documents, positions, denominator=None):
    """Position by position, depth by depth, straight from the definition."""
    weights = model.multi_token.weights.by_depth(model.multi_token.n)
    text = nextn.model.Text(ids, positions, documents)
    hidden, tapped = model.run_trunk(text)
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


@pytest.mark.parametrize("stated", ["separate", "low_rank:6", "trimmed:20", "trimmed:20,own,each", "clustered:8:2,own"])
@pytest.mark.parametrize("kind", ["recurrent", "parallel", "shared_kv"])
def test_every_output_has_the_loss_and_gradients_of_its_definition(stated, kind):
    """Σ_k w_k of -log softmax over all that can be named, and of the clusters beside it."""
    torch.manual_seed(0)
    config = nextn.MultiTokenConfig(n=3, output=OutputConfig.parse(stated), **MORE_KINDS[kind])
    model = nextn.attach(make_host("llama").double(), config)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = model(ids, labels=ids)
    loss = given.loss
    grads = torch.autograd.grad(loss, trained)
    text = nextn.model.as_text(ids, None, None)
    _hidden, tapped = model.run_trunk(text)
    expected = 0.0
    for k, (state, weight) in enumerate(zip(model.heads(model.trunk, tapped, text), model.weights[1:], strict=True), 2):
        output, hits = model.heads.output.at(k), 0
        for row in range(2):
            for t in range(9 - k):
                target = int(ids[row, t + k])
                named = output(model.trunk, state[row, t])[target] > -torch.inf
                if stated.startswith("clustered"):
                    q = output.table(state[row, t]).log_softmax(-1)
                    cluster = int((output.members() == target).any(dim=1).nonzero())
                    expected -= weight * output.centroids(state[row, t].detach()).log_softmax(-1)[cluster]
                else:
                    q = output(model.trunk, state[row, t]).log_softmax(-1)
                if q[target] > -torch.inf:
                    expected -= weight * q[target]
                hits += bool(named and q.argmax() == target)
        assert given.depth_accuracies[k - 1].item() == pytest.approx(hits / (2 * (9 - k)))
    torch.testing.assert_close(loss.double(), expected / 16, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(grads, torch.autograd.grad(expected / 16, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", MORE_KINDS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_loss_and_gradients_equal_the_slow_reference(kind, frozen, checkpointing, monkeypatch):
    monkeypatch.setattr(nextn.losses, "CHUNK", 5 * VOCAB)
    config = nextn.MultiTokenConfig(
        n=4, freeze_trunk=frozen, weights={"preset": "list", "values": [0.5, 1.0, 0.7, 0.3]}, **MORE_KINDS[kind]
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
    if checkpointing:
        model.train().gradient_checkpointing_enable()
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


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_packed_padded_and_accumulated_give_one_loss(kind):
    model = nextn.attach(make_host("gemma3"), nextn.MultiTokenConfig(n=3, **MORE_KINDS[kind]))
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


def plain_objective(z, target, p, p_named, follows, temperature):
    """One position, straight from the definition: logits z [V'], the trunk's distribution over what can be named."""
    if follows == "text":
        return -z.log_softmax(-1)[target]
    log_q = (z / temperature).log_softmax(-1)
    divergence = (torch.xlogy(p_named, p_named) - p_named * log_q).sum() * temperature**2
    overlap = torch.minimum(p_named, log_q.exp()).sum()
    share = {"kl": 1.0, "tv": 0.0, "lk": (-3 * overlap.detach()).exp()}[follows]
    return share * divergence + (1 - share) * (1 - overlap)


@pytest.mark.parametrize("kept", [None, 40])
@pytest.mark.parametrize(
    ("follows", "temperature"), [("text", 1.0), ("kl", 1.0), ("kl", 2.0), ("tv", 1.0), ("tv", 0.7), ("lk", 1.0)]
)
@pytest.mark.parametrize(("wrapped", "top"), [(False, None), (True, None), (False, 7)])
def test_objectives_and_their_gradients_equal_autograd(follows, temperature, kept, wrapped, top):
    host = make_host("llama").double()
    if wrapped:  # as an adapter wraps it: no plain Linear any more
        host.lm_head = Wrapped(host.lm_head)
    trunk = Trunk(host)
    output = SharedOutput() if kept is None else TrimmedOutput(kept, trunk, trunk.width, own=False)
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = [torch.randint(0, VOCAB, (2, 9), generator=generator) for _ in range(2)]
    targets[0][0, 4:] = IGNORE
    teachers = [drawn(2, 9, trunk.width) for _ in range(2)]
    states = [drawn(2, 9, trunk.width).requires_grad_() for _ in range(2)]
    weight = trunk.unembedding.weight
    of_states = [TrunkStates(each) for each in teachers]
    of_top = [_top(each @ weight.detach().T / temperature, top) for each in teachers] if top else []
    depths = [Depth(states[i], targets[i], w, (of_top or of_states)[i]) for i, w in enumerate((0.7, 0.3))]
    objective = ObjectiveConfig(follows=follows, temperature=temperature)
    found = depth_losses(trunk, output, depths, objective, chunk=4)
    ours = torch.autograd.grad(found.total * 0.5, [*states, weight])

    slow, hits, overlaps = torch.zeros((), dtype=torch.float64), [], [0.0, 0.0]
    for i, w in enumerate((0.7, 0.3)):
        for row in range(2):
            for t in range(9):
                target, z = int(targets[i][row, t]), states[i][row, t] @ weight.T
                p = (teachers[i][row, t] @ weight.T / temperature).softmax(-1).detach()
                if top:
                    p = torch.where(p >= p.topk(top).values[-1], p, 0.0)
                named = slice(None) if kept is None else output.kept.long()
                hits.append(int(z[named].argmax()) == target)
                if target == IGNORE or (follows == "text" and kept is not None and target >= kept):
                    continue
                slow = slow + w * plain_objective(z[named], target, p, p[named], follows, temperature)
                overlaps[i] += torch.minimum(p[named], (z[named] / temperature).softmax(-1)).sum().item()
    torch.testing.assert_close(found.total, slow)
    for our, their in zip(ours, torch.autograd.grad(slow * 0.5, [*states, weight]), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-10)
    assert found.hits.flatten().tolist() == hits
    if follows != "text":
        torch.testing.assert_close(found.overlaps.tolist(), overlaps)


def _top(scaled, k):
    """In double precision, where `TopTokens.of` stores half."""
    log_probs, tokens = scaled.log_softmax(-1).topk(k)
    return TopTokens(tokens, log_probs)


@pytest.mark.parametrize("share_of", [None, "sequences"])
def test_a_depth_follows_what_the_trunk_says_of_the_same_token(share_of):
    """KL of depth k at t is against the trunk's word at t + k - 1: position by position, from the definition."""
    config = nextn.MultiTokenConfig(n=4, recurrent=True, objective={"follows": "kl"})
    model = nextn.attach(make_host("llama").double(), config).train()
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    rows = range(3)
    if share_of:
        model.schedule = ScheduleConfig(share=0.4, share_of=share_of)  # one row of three
        torch.manual_seed(5)
        rows = torch.randperm(3)[:1].tolist()
        torch.manual_seed(5)
    loss = model(ids, labels=ids).loss
    text = nextn.model.as_text(ids, None, None)
    with torch.no_grad():
        hidden, tapped = model.run_trunk(text)
        states, said = model.heads(model.trunk, tapped, text), model.trunk.logits(hidden).log_softmax(-1)
        expected = 0.0
        for k, (state, weight) in enumerate(zip(states, model.weights[1:], strict=True), start=2):
            for row in rows:
                for t in range(ids.shape[1] - k):
                    q = model.trunk.logits(state[row, t]).log_softmax(-1)
                    p = said[row, t + k - 1]
                    expected += weight * (p.exp() * (p - q)).sum()
    scale = 3 if share_of else 1
    torch.testing.assert_close(loss.double(), scale * expected / (3 * 11), rtol=1e-6, atol=1e-9)


def test_a_fused_kernel_takes_the_place_of_our_own_operations(monkeypatch):
    """What `judge` makes of a kernel's answer, with a kernel made of autograd."""
    asked = []

    def cross_entropy(logits, targets):
        asked.append(len(logits))
        leaf = logits.clone().requires_grad_()
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(leaf, targets, reduction="sum")
        logits.copy_(torch.autograd.grad(loss, leaf)[0])
        return loss.detach(), leaf.argmax(dim=-1)

    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3)).train()
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        if fused:
            monkeypatch.setattr(nextn.losses.fused, "cross_entropy", cross_entropy)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        found.append((output.loss, output.depth_accuracies, model.heads.steps[0].eh_proj.weight.grad.clone()))
    assert asked
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_top_tokens_are_those_of_the_softmax_and_its_probabilities():
    trunk = Trunk(make_host("llama"))
    hidden = torch.randn(2, 5, trunk.width) * 30
    logits = trunk.logits(hidden).detach()
    top, p = TopTokens.of(trunk, hidden, 8, 1.5), (logits / 1.5).softmax(-1)
    torch.testing.assert_close(top.log_probs.float().exp(), p.gather(-1, top.tokens.long()), rtol=5e-3, atol=1e-6)
    assert (top.log_probs[..., 1:] <= top.log_probs[..., :-1]).all()
    assert torch.equal(top.tokens[..., 0].long(), logits.argmax(-1))
    assert torch.equal(top.ahead(2).tokens[:, 0], top.tokens[:, 2])


class Wrapped(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, states):
        return self.linear(states)


def test_the_unembedding_is_entered_as_a_module():
    """FSDP2 gathers a sharded weight in a forward hook, and scatters its gradient in hooks around the backward."""
    trunk = Trunk(make_host("llama"))
    calls = []
    trunk.unembedding.register_forward_pre_hook(lambda *_: calls.append("before"))
    trunk.unembedding.register_forward_hook(lambda *_: calls.append("after"))
    states = torch.randn(1, 4, trunk.width)
    depths = [Depth(states, torch.full((1, 4), 5), 1.0) for _ in range(3)]
    depth_losses(trunk, SharedOutput(), depths)
    assert calls == ["before", "after"]
    assert "forward" not in trunk.unembedding.__dict__
    torch.testing.assert_close(trunk.logits(states), torch.nn.functional.linear(states, trunk.unembedding.weight))


def test_bfloat16_and_autocast_are_near_float32():
    trunk = Trunk(make_host("llama"))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 30, trunk.width, generator=generator)
    targets = torch.randint(0, VOCAB, (2, 30), generator=generator)

    def found(states, trunk):
        states = states.clone().requires_grad_()
        total = depth_losses(trunk, SharedOutput(), [Depth(states, targets, 1.0)], chunk=16).total
        return [total.detach(), *torch.autograd.grad(total, [states, trunk.unembedding.weight])]

    exact = found(states, trunk)
    with torch.autocast("cpu", torch.bfloat16):
        cast = found(states, trunk)
    half = found(states.bfloat16(), Trunk(make_host("llama").bfloat16()))
    assert [tensor.dtype for tensor in half[1:]] == [torch.bfloat16] * 2
    for approximate in (cast, half):
        for ours, theirs in zip(approximate, exact, strict=True):
            assert (ours.float() - theirs).norm() / theirs.norm() < 0.02


def test_depths_that_read_one_state_share_its_gradient():
    trunk = Trunk(make_host("llama").double())
    state = torch.randn(1, 6, trunk.width, dtype=torch.float64, requires_grad=True)
    targets = [torch.full((1, 6), target) for target in (5, 9)]

    def gradient(states):
        depths = [Depth(each, target, 1.0) for each, target in zip(states, targets, strict=True)]
        return torch.autograd.grad(depth_losses(trunk, SharedOutput(), depths).total, state)[0]

    torch.testing.assert_close(gradient([state, state]), gradient([state, state * 1]))


def test_a_second_backward_says_what_to_do():
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=2))
    ids = torch.randint(3, VOCAB, (1, 9))
    loss = model(ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the model again"):
        loss.backward()


def test_a_compiled_model_has_the_same_loss_and_gradients():
    model = nextn.attach(
        make_host("llama"), nextn.MultiTokenConfig(n=3, freeze_trunk=False, weights={"preset": "gloeckle"})
    ).train()
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    losses, grads = [], []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        losses.append(run(ids, labels=ids).loss)
        losses[-1].backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(losses[0], losses[1])
    assert len(grads[0]) > 30
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share_of", ["positions", "sequences"])
def test_a_share_of_the_batch_gives_the_whole_gradient_on_average(share_of):
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=3)).train()
    ids = torch.randint(3, VOCAB, (4, 16), generator=torch.Generator().manual_seed(0))
    weight = model.heads.steps[0].eh_proj.weight

    def gradient():
        return torch.autograd.grad(model(ids, labels=ids).loss, weight)[0]

    whole = gradient()
    model.schedule = ScheduleConfig(share=0.5, share_of=share_of)
    torch.manual_seed(0)
    parts = torch.stack([gradient() for _ in range(300)])
    assert (parts[0] - parts[1]).norm() > 0.1 * whole.norm(), "each time another share"
    spread = parts.std(dim=0).norm() / 300**0.5
    assert (parts.mean(dim=0) - whole).norm() < 4 * spread
    model.eval()
    torch.testing.assert_close(gradient(), whole)


def test_noise_takes_states_of_shorter_chains_for_the_same_place():
    config = nextn.MultiTokenConfig(n=4, recurrent=True, state_noise=1.0)
    heads = nextn.attach(make_host("llama"), config).train().heads
    # each state says (how many steps made it, the place that it stands for)
    anchors = torch.arange(10.0)
    states = [torch.stack([torch.full((10,), float(j)), anchors + j], dim=-1)[None] for j in range(3)]
    torch.manual_seed(0)
    drawn = torch.cat([heads._fed(states) for _ in range(20)])
    inside = drawn[:, :8]  # the last places have nothing ahead to take from
    assert set(inside[..., 0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(inside[..., 1], (anchors + 2)[:8].expand(20, 8))
    assert torch.equal(heads._fed(states[:1]), states[0])
    assert torch.equal(heads.eval()._fed(states), states[2])
