"""Trees: one forward over all branches, and still the plain text."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nextn
from conftest import CONFIGS, MORE_KINDS, greedy_reference, made_up_text, make_host
from nextn.decoding.sampling import Sampling
from nextn.decoding.tree import Chances, Tree, TreeError, TreeGrowth, rank_shares
from nextn.decoding.verify import ScoreTree
from nextn.heads.base import Window
from nextn.trunk import RaggedCache, Trunk

WIDE = Tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0)))
TREES = {"static": WIDE, "chain": Tree.chain(3), "shallow": Tree(((0,), (1,))), "grown": Tree(nodes=8, beam=3)}


@st.composite
def trees(draw) -> Tree:
    paths: list[tuple[int, ...]] = [(0,)]
    for _ in range(draw(st.integers(0, 9))):
        parent = draw(st.sampled_from([(), *(path for path in paths if len(path) < 3)]))
        paths.append((*parent, draw(st.integers(0, 3))))
    return Tree(tuple(paths))


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("rows", [1, 4])
def test_any_tree_gives_the_plain_text(trained_model, prompts, name, rows):
    engine = trained_model.engine(rows=rows, stop_tokens=[], tree=TREES[name])
    results = dict(engine.generate(prompts, 24))
    for index, prompt in enumerate(prompts):
        assert results[index].tokens == greedy_reference(trained_model.base, prompt, 24)
    assert any(count for result in results.values() for count in result.accepted)


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_ranks_beyond_what_heads_can_name_are_no_drafts(kind, prompts):
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 4}, **MORE_KINDS[kind])
    model = nextn.attach(make_host("llama"), config)
    tree = Tree(((0,), (5,), (5, 0), (5, 0, 0), (0, 9)))
    for sampling in (Sampling(), Sampling(temperature=1.0, repetition_penalty=1.2, seed=0)):
        plain = dict(model.engine(heads=1, stop_tokens=[]).generate(prompts, 9, sampling=sampling))
        found = dict(model.engine(rows=2, stop_tokens=[], tree=tree).generate(prompts, 9, sampling=sampling))
        assert [found[i].tokens for i in range(len(prompts))] == [plain[i].tokens for i in range(len(prompts))]


@settings(max_examples=12)
@given(tree=trees(), seed=st.integers(0, 100))
def test_made_up_trees_give_the_plain_text_by_chance_too(trained_model, tree, seed):
    prompts = made_up_text(3, 7, seed=seed).tolist()
    sampling = [Sampling(temperature=1.2, top_k=20, repetition_penalty=1.2, seed=seed + row) for row in range(3)]
    plain = dict(trained_model.engine(heads=1, stop_tokens=[]).generate(prompts, 16, sampling=sampling))
    with_tree = dict(trained_model.engine(rows=2, stop_tokens=[], tree=tree).generate(prompts, 16, sampling=sampling))
    assert [with_tree[row].tokens for row in range(3)] == [plain[row].tokens for row in range(3)]


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[] if family == "gemma3" or kind == "recurrent" else [pytest.mark.slow])
        for family, kind in itertools.product(CONFIGS, MORE_KINDS)
        if (family, kind) != ("deepseek_v3", "shared_kv")
    ],
)
def test_trees_on_every_family_and_kind(family, kind):
    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 40}, **MORE_KINDS[kind])
    model = nextn.attach(make_host(family), config)
    prompts = made_up_text(2, 11, seed=1).tolist()
    for tree in (WIDE, TREES["grown"]):
        results = dict(model.engine(rows=2, stop_tokens=[], tree=tree).generate(prompts, 12))
        for index, prompt in enumerate(prompts):  # past the sliding window
            assert results[index].tokens == greedy_reference(model.base, prompt, 12)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_node_has_the_logits_of_its_own_text(family):
    host = make_host(family)
    trunk = Trunk(host)
    text = made_up_text(1, 12, seed=3)
    cache = RaggedCache(len(trunk.layers), 1, 40)
    positions = torch.arange(11)[None]
    tokens = torch.tensor([[int(text[0, 11]), 5, 9, 20, 21, 30]])
    parents, depths = [0, 0, 0, 1, 2, 4], torch.tensor([[0, 1, 1, 2, 2, 3]])
    sees = torch.eye(6, dtype=torch.bool)
    for node in range(1, 6):
        sees[node] |= sees[parents[node]]
    with torch.no_grad():
        trunk.run(text[:, :11], positions, cache.place(positions), cache)
        seen = torch.arange(cache.reach(17))
        logits, _, _ = ScoreTree(trunk, "post_norm")(
            tokens, depths, sees[None], torch.tensor([11]), torch.tensor([99]), seen, cache.buffers
        )
        for node in range(6):
            path = tokens[0, sees[node]].tolist()
            alone = host(torch.tensor([text[0, :11].tolist() + path]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[0, node], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_a_branch_is_drafted_as_if_it_were_the_only_one(kind):
    """Each path of a tree against a chain that is forced down that path."""
    config = nextn.MultiTokenConfig(n=4, **MORE_KINDS[kind])
    model = nextn.attach(make_host("llama"), config)
    trunk, heads = model.trunk, model.heads
    text = made_up_text(1, 12, seed=8)
    positions = torch.arange(11)[None]
    cache = RaggedCache(len(trunk.layers), 1, 64)
    with torch.no_grad():
        _, tapped = trunk.run(text[:, :11], positions, cache.place(positions), cache, heads.tap)
    window = Window(tapped, positions, text[:, 1:], torch.tensor([10]))

    def caches() -> list[RaggedCache]:
        read = [RaggedCache.over([cache.buffers[layer]], torch.arange(64)) for layer in heads.reads]
        return [RaggedCache(1, 1, 64) for _ in range(heads.cache_count)] + read

    no_noise = Chances(torch.zeros(1), torch.zeros(1, 3, dtype=torch.long))
    with torch.no_grad():
        tree = TreeGrowth(WIDE, 3, no_noise)
        drafts = heads.draft(trunk, window, caches(), None, tree)[0].tolist()
        _, _, sees = tree.shape()
        for node, path in enumerate(WIDE.paths, start=1):
            alone = TreeGrowth(Tree(tuple(path[: end + 1] for end in range(len(path)))), 3, no_noise)
            expected = heads.draft(trunk, window, caches(), None, alone)[0].tolist()
            assert [token for token, on in zip(drafts, sees[0, node, 1:].tolist(), strict=True) if on] == expected


def test_a_grown_tree_holds_the_most_probable_paths():
    model = nextn.attach(make_host("llama"), nextn.MultiTokenConfig(n=4, heads="parallel"))
    growth = TreeGrowth(Tree(nodes=6, beam=3), 3, Chances(torch.zeros(2), torch.zeros(2, 3, dtype=torch.long)))
    states = torch.randn(2, 1, 32)
    for depth in (2, 3, 4):
        level = growth.level(model.trunk, model.heads.output, states, depth, torch.tensor([5, 9]))
        states = torch.randn(2, level.tokens.shape[1], 32)
    parents, depths, sees = growth.shape()
    assert parents.shape == (2, 6) and sees.shape == (2, 6, 6)
    confidence = torch.cat(growth.confidence, dim=1)
    kept = confidence.sort(dim=1, descending=True).values[:, :5]
    assert (kept[:, -1] >= confidence.sort(dim=1, descending=True).values[:, 5]).all()
    for row in range(2):
        for node in range(1, 6):
            assert parents[row, node] < node and depths[row, node] == depths[row, parents[row, node]] + 1


def test_a_tuned_tree_takes_what_is_most_often_right():
    shares = [[0.6, 0.2, 0.1], [0.5, 0.1], [0.4, 0.1]]
    tree = Tree.tuned(shares, 6)
    assert tree.expected(shares) == pytest.approx(1 + 0.6 + 0.3 + 0.2 + 0.12 + 0.1)
    every = list(itertools.chain(*(itertools.product(range(3), repeat=depth) for depth in (1, 2, 3))))
    others = (paths for paths in itertools.combinations(every[:15], 5) if _is_tree(paths))
    assert all(tree.expected(shares) >= Tree(paths).expected(shares) - 1e-9 for paths in others)
    assert Tree.tuned(shares, 4).nodes == 4


def _is_tree(paths) -> bool:
    return all(len(path) == 1 or path[:-1] in paths for path in paths)


def test_shares_of_ranks_are_counted_along_the_text():
    shares = rank_shares([[0, 1], [2], [None], [0, 0]], drafts=2, ranks=3)
    assert shares == [[0.5, 0.0, 0.25], [0.5, 0.5, 0.0]]


@pytest.mark.parametrize(
    ("paths", "match"), [(((0, 0),), "no parent"), ((), "at least one node"), (((-1,),), "no parent")]
)
def test_trees_that_cannot_be_are_refused(paths, match, tmp_path):
    with pytest.raises(TreeError, match=match):
        Tree(paths)
    (tmp_path / "tree.json").write_text("{}")
    with pytest.raises(TreeError, match="holds no tree"):
        Tree.read(tmp_path / "tree.json")
    (tmp_path / "tree.json").write_text('{"paths": [[0], [1], [0, 0]]}')
    assert Tree.read(tmp_path / "tree.json").nodes == 4


def test_an_engine_refuses_a_tree_that_its_heads_cannot_fill(trained_model):
    with pytest.raises(ValueError, match="up to 4 tokens ahead"):
        trained_model.engine(tree=Tree.chain(4))
    with pytest.raises(ValueError, match="needs a drafter"):
        trained_model.engine(heads=1, tree=WIDE)
    with pytest.raises(ValueError, match="coupled"):
        list(trained_model.engine(tree=WIDE).generate([[5]], 4, sampling=Sampling(1.0, method="rejection")))
