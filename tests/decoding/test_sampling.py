"""Sampling: the trunk's own law after every processor, and with coupling the same text with drafts and without."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers as tf
from scipy import stats

from conftest import KINDS, VOCAB, Restless, made_up_text
from nextn.decoding import choosing
from nextn.decoding.engine import Engine
from nextn.decoding.pace import Profile
from nextn.decoding.rows import Generation, Row
from nextn.decoding.sampling import Sampling, SamplingError, gumbel, keys, prompt_seeds, uniform
from nextn.decoding.tree import Tree
from nextn.decoding.verify import Draw, accept_greedy

PROMPT = made_up_text(1, 9, seed=77)[0].tolist()


class NoRepeat(tf.LogitsProcessor):
    """A user's own: no token twice in a row."""

    stateless = True

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class Alternating(tf.LogitsProcessor):
    """A user's own that counts its calls: even tokens, then odd ones."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == self.calls % 2, -torch.inf)


SAMPLINGS = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7": {"temperature": 0.7},
    "top-k": {"temperature": 1.3, "top_k": 5},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "min-p": {"temperature": 3.0, "min_p": 0.05},
    "repetition penalty": {"temperature": 1.0, "repetition_penalty": 1.8},
    "bad words": {"temperature": 1.0, "processors": (tf.NoBadWordsLogitsProcessor([[7], [9, 10], [30, 31]], 2),)},
    "n-grams": {"temperature": 1.5, "processors": (tf.NoRepeatNGramLogitsProcessor(2),)},
    "bias": {"temperature": 1.0, "processors": (tf.SequenceBiasLogitsProcessor([[[12], 4.0], [[12, 40], 3.0]]),)},
    "typical": {"temperature": 1.0, "processors": (tf.TemperatureLogitsWarper(3.0), tf.TypicalLogitsWarper(0.9))},
    "own": {"temperature": 1.0, "processors": (NoRepeat(),)},
}  # fmt: skip


def test_random_numbers_are_what_they_should_be():
    key = keys(torch.arange(300), torch.arange(100).expand(300, -1))
    assert len(key.unique()) == key.numel()
    assert stats.kstest(uniform(key).flatten().numpy(), "uniform").pvalue > 1e-3
    noise = gumbel(key[:, :20], torch.arange(50))
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    scores = torch.tensor([2.0, 1, 0, -1, 0.5, 0, 0, 3])
    drawn = (scores + gumbel(keys(torch.tensor([5]), torch.arange(100_000)[None]), torch.arange(8))).argmax(-1)[0]
    pairs = torch.bincount(drawn[:-1] * 8 + drawn[1:], minlength=64).double()
    law = torch.outer(scores.softmax(0), scores.softmax(0)).flatten().double()
    assert stats.chisquare(pairs, law / law.sum() * pairs.sum()).pvalue > 1e-3
    subset = torch.tensor([3, 60])
    assert torch.equal(gumbel(key[:5, :2], subset), gumbel(key[:5, :2], torch.arange(64))[..., subset])


@torch.no_grad()
def joint_law(host, sampling: Sampling, prompt: list[int]) -> torch.Tensor:
    """The law of the next three tokens, the third in eight classes, the slow way [V, V, 8]: every text on its own."""

    def after(texts: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(texts)
        logits = host(ids, use_cache=False).logits[:, -1].float()
        for processor in sampling.all_processors:
            logits = torch.cat([processor(text[None], row[None]) for text, row in zip(ids, logits, strict=True)])
        return logits.softmax(-1).double()

    first = after([prompt])[0]
    second = after([[*prompt, token] for token in range(VOCAB)])
    joint = torch.zeros(VOCAB, VOCAB, 8, dtype=torch.float64)
    for token in range(VOCAB):
        pairs = first[token] * second[token]
        likely = (pairs > 0).nonzero()[:, 0].tolist()
        if likely:
            third = after([[*prompt, token, other] for other in likely]).view(len(likely), 8, -1).sum(-1)
            joint[token, likely] = pairs[likely, None] * third
    return joint / joint.sum()


def drawn_joint(engine: Engine, sampling: Sampling, prompt: list[int], count: int) -> torch.Tensor:
    results = list(engine.generate([prompt] * count, 5, sampling=sampling))
    tokens = torch.tensor([result.tokens[:3] for _, result in results])
    cells = (tokens[:, 0] * VOCAB + tokens[:, 1]) * 8 + tokens[:, 2] // 8
    return torch.bincount(cells, minlength=VOCAB * VOCAB * 8)


def p_value(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Chi-square; cells of fewer than five expected draws are one."""
    expected = law.flatten() * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token came that cannot come"
    often = expected >= 5
    observed = np.append(counts[often].double().numpy(), float(counts[~often].sum()))
    wanted = np.append(expected[often].numpy(), float(expected[~often].sum()))
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    return stats.chisquare(observed, wanted / wanted.sum() * observed.sum()).pvalue


WAYS = {
    "coupled": {},
    "rejection": {"method": "rejection"},
    "rejection of greedy drafts": {"method": "rejection", "sampled_drafts": False},
    "block": {"method": "rejection", "block": True},
}


@pytest.fixture(scope="module")
def one_kind(trained_host):
    """Recurrent heads that are trained: the law of the text must not depend on the kind."""
    import copy

    import nextn
    from conftest import fit

    config = nextn.MultiTokenConfig(n=4, output={"kind": "trimmed", "size": 52}, **KINDS["recurrent"])
    model = nextn.attach(copy.deepcopy(trained_host), config, calibration={"input_ids": made_up_text(8, 48, seed=999)})
    fit(model.train(), 100)
    return model.eval()


# Every processor in one way and every way with one processor; the other pairs are slow.
PAIRS = [
    pytest.param(name, way, marks=[] if way == "block" or name == "top-k" else [pytest.mark.slow])
    for name in SAMPLINGS
    for way in WAYS
]


def test_noise_is_the_same_for_few_and_for_all_tokens(monkeypatch):
    scores = torch.randn(3, 4, 500, generator=torch.Generator().manual_seed(0)) * 6
    scores[0, 1, ::2], scores[2, 2, 3] = -torch.inf, torch.nan
    key, drawing = keys(torch.arange(3), torch.arange(4).expand(3, 4)), [True, False, True]
    found = []
    for few in (0.0, 1.1):
        monkeypatch.setattr(choosing, "FEW", few)
        found.append(choosing._drawn(scores, key, drawing, None))
    assert torch.equal(*found) and found[0][2, 2] == -1
    assert torch.equal(found[0][1], scores[1].argmax(-1)) and not torch.equal(found[0][0], scores[0].argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_in_turn_are_the_same_tokens_as_far_as_they_are_emitted(dtype):
    several = [Sampling(temperature=0.7), Sampling(temperature=1.0), Sampling(), Sampling(temperature=0.7)]
    rows = [Row(place, Generation([1]), 9, sampling=each, seed=place) for place, each in enumerate(several)]
    logits = (torch.randn(5, 4, 500, generator=torch.Generator().manual_seed(0)) * 6).to(dtype)
    logits[1, 2, 3] = torch.nan
    slots, at = [*rows, None], 5 + torch.arange(4).expand(5, 4)
    expected, _ = choosing.choose(slots, logits, at, [])
    drafts = expected[:, :3].clone()
    drafts[3, 1] += 1
    found = choosing.choose_in_turn(slots, logits, at, drafts, Draw())
    assert torch.equal(accept_greedy(drafts, found)[:4], torch.tensor([3, 2, 3, 1])) and expected[1, 2] == -1
    emitted = torch.tensor([4, 3, 4, 2])
    assert all(torch.equal(found[row, :count], expected[row, :count]) for row, count in enumerate(emitted))
    assert found[3].tolist()[2:] == [0, 0]


@pytest.mark.parametrize(
    ("said", "scale"),
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"temperature": 1.0}, 1.0),
        ({"temperature": 1.0, "processors": [tf.TemperatureLogitsWarper(0.5)]}, 0.5),
        ({"temperature": 0.7, "processors": [tf.TemperatureLogitsWarper(0.5)]}, None),
        ({"processors": [tf.TemperatureLogitsWarper(0.5)]}, None),
        ({"temperature": 1.0, "processors": [NoRepeat()]}, None),
        ({"temperature": 0.7, "top_k": 5}, None),
        ({"repetition_penalty": 1.2}, None),
        ({"temperature": 0.7, "method": "rejection"}, None),
        ({"temperature": 1.0, "method": "rejection"}, None),
    ],
)
def test_which_texts_need_nothing_but_a_temperature(said, scale):
    assert Sampling(**said).scale == scale


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_three_tokens_have_the_trunks_joint_law(one_kind, name, way):
    sampling = Sampling(**SAMPLINGS[name], **WAYS[way], seed=1000)
    engine = one_kind.engine(rows=64, stop_tokens=[])
    counts = drawn_joint(engine, sampling, PROMPT, 4000)
    assert p_value(counts, joint_law(one_kind.base, sampling, PROMPT)) > 1e-4


@pytest.mark.parametrize("way", ["rejection", pytest.param("block", marks=pytest.mark.slow)])
def test_the_joint_law_stays_where_the_number_of_drafts_changes(one_kind, way):
    sampling = Sampling(**SAMPLINGS["temperature 1"], **WAYS[way], seed=2000)
    engine = one_kind.engine(rows=64, stop_tokens=[], depth="auto")
    engine.paces = {64: (pace := Restless(3, Profile(dict.fromkeys(range(4), 1.0))))}
    pace.plan = [1, 3, 2, 0]
    counts = drawn_joint(engine, sampling, PROMPT, 4000)
    assert set(engine.steps) > {1, 2, 3}
    assert p_value(counts, joint_law(one_kind.base, sampling, PROMPT)) > 1e-4


def texts(engine: Engine, prompts, new: int, sampling) -> list[list[int]]:
    return [result.tokens for _, result in sorted(engine.generate(prompts, new, sampling=sampling), key=lambda r: r[0])]


@pytest.mark.parametrize("name", ["top-p", "repetition penalty"])
def test_coupled_text_is_the_same_with_drafts_and_without_whatever_the_mates(trained_model, prompts, name):
    coupled_everywhere(trained_model, prompts, name)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_coupled_text_is_the_same_after_any_processor(one_kind, prompts, name):
    coupled_everywhere(one_kind, prompts, name)


def coupled_everywhere(trained_model, prompts, name) -> None:
    prompts = prompts * 2
    sampling = [Sampling(**SAMPLINGS[name], seed=seed) for seed in range(len(prompts))]
    plain = texts(trained_model.engine(rows=1, heads=1, stop_tokens=[]), prompts, 40, sampling)
    assert len({tuple(text) for text in plain}) > len(set(map(tuple, prompts)))
    for rows, depth, tree in ((1, None, None), (5, None, None), (12, 1, None), (5, None, Tree(nodes=7, beam=3))):
        engine = trained_model.engine(rows=rows, stop_tokens=[], depth=depth, tree=tree)
        assert texts(engine, prompts, 40, sampling) == plain
    backwards = texts(trained_model.engine(rows=4, stop_tokens=[]), prompts[::-1], 40, sampling[::-1])
    assert backwards == plain[::-1]


def test_coupled_drafts_stand_as_often_as_their_law_lets_them(one_kind):
    """Coupled or by rejection, about as many stand; drafts with noise of their own would stand far less often."""
    prompts = made_up_text(16, 12, seed=5).tolist()
    accepted = {}
    for way in WAYS:
        results = one_kind.engine(rows=16, stop_tokens=[]).generate(
            prompts, 60, sampling=Sampling(temperature=1.0, **WAYS[way])
        )
        counts = [count for _, result in results for count in result.accepted]
        accepted[way] = sum(counts) / len(counts)
    assert accepted["coupled"] > 0.3 and accepted["block"] > 0.3
    assert accepted["coupled"] > 0.8 * accepted["rejection"]


def test_rows_may_be_sampled_each_in_its_own_way(one_kind, prompts):
    samplings = [
        Sampling(), Sampling(temperature=1.0, seed=3), Sampling(temperature=0.7, method="rejection", seed=4),
        Sampling(repetition_penalty=1.5), Sampling(temperature=1.0, top_k=3, seed=5), Sampling(),
    ]  # fmt: skip
    engine = one_kind.engine(rows=3, stop_tokens=[])
    together = texts(engine, prompts, 20, samplings)
    for prompt, sampling, text in zip(prompts, samplings, together, strict=True):
        assert texts(one_kind.engine(stop_tokens=[]), [prompt], 20, [sampling]) == [text]


def test_prompts_of_one_call_share_no_text_with_those_of_neighbouring_seeds(one_kind):
    engine = one_kind.engine(rows=4, stop_tokens=[])
    by_seed = [texts(engine, [PROMPT] * 4, 20, Sampling(temperature=2.0, seed=seed)) for seed in range(7, 12)]
    assert len({tuple(text) for found in by_seed for text in found}) == 5 * 4
    assert texts(one_kind.engine(heads=1, stop_tokens=[]), [PROMPT] * 4, 20, Sampling(2.0, seed=7)) == by_seed[0]
    assert texts(engine, [PROMPT], 20, Sampling(temperature=2.0, seed=7)) == by_seed[0][:1]


def test_seeds_of_prompts_are_those_of_no_other_call():
    seeds = {seed for first in range(-50, 50) for seed in prompt_seeds(first, 50)}
    assert len(seeds) == 100 * 50 and all(0 <= seed < 2**62 for seed in seeds)
    assert prompt_seeds(5, 3) == prompt_seeds(5, 8)[:3] and prompt_seeds(5, 0) == []


@pytest.mark.parametrize("each_its_own", [False, True])
def test_without_a_seed_every_call_draws_another_one(one_kind, each_its_own):
    engine, sampling = one_kind.engine(rows=2, stop_tokens=[]), Sampling(temperature=2.0)
    asked = [sampling, sampling] if each_its_own else sampling
    torch.manual_seed(1)
    first, second = (texts(engine, [PROMPT] * 2, 20, asked) for _ in range(2))
    assert len(set(map(tuple, first + second))) == 4
    torch.manual_seed(1)
    assert texts(engine, [PROMPT] * 2, 20, asked) == first


def test_greedy_decoding_leaves_pytorchs_generator_alone(one_kind):
    before = torch.get_rng_state()
    texts(one_kind.engine(stop_tokens=[]), [PROMPT], 5, [Sampling(repetition_penalty=1.2)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3), 3])
def test_a_seed_may_be_any_integer(seed):
    assert Sampling(seed=seed) == Sampling(seed=3) and type(Sampling(seed=seed).seed) is int


@pytest.mark.parametrize(
    "wrong",
    [{"seed": 1.5}, {"seed": "3"}, {"seed": [1]}, {"top_k": 2.5}, {"top_k": None}, {"temperature": "warm"},
     {"temperature": None}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"min_p": "0"},
     {"repetition_penalty": float("inf")}],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused_in_a_sentence(wrong):
    (name,) = wrong
    with pytest.raises(SamplingError, match=f"^{name} is .*must be"):
        Sampling(**wrong)


def test_a_processor_that_remembers_sees_each_token_once(one_kind, caplog):
    with caplog.at_level(logging.WARNING):
        found = texts(
            one_kind.engine(rows=2, stop_tokens=[]), [PROMPT, PROMPT], 10, Sampling(processors=(Alternating(),))
        )
    assert "Alternating" in caplog.text and "stateless" in caplog.text
    for text in found:  # each text has a processor of its own
        assert [token % 2 for token in text] == [0, 1] * 5
    results = list(
        one_kind.engine(stop_tokens=[]).generate([PROMPT], 10, sampling=Sampling(processors=(Alternating(),)))
    )
    assert set(results[0][1].drafted) == {0}


@pytest.mark.parametrize("name", ["watermark", "guidance"])
def test_stateful_processors_of_transformers_force_plain_steps(one_kind, name, caplog):
    def processor():
        if name == "watermark":
            return tf.WatermarkLogitsProcessor(VOCAB, "cpu", greenlist_ratio=0.5, bias=30.0)
        return tf.UnbatchedClassifierFreeGuidanceLogitsProcessor(-3.0, one_kind.base)

    def by_hand(prompt: list[int], count: int) -> list[int]:
        text, own = list(prompt), processor()
        for _ in range(count):
            ids = torch.tensor([text])
            text.append(int(own(ids, one_kind.base(ids).logits[:, -1].float()).argmax()))
        return text[len(prompt) :]

    prompts = [PROMPT, PROMPT[:3]]
    with torch.no_grad():
        expected = [by_hand(prompt, 12) for prompt in prompts]
    with caplog.at_level(logging.WARNING):
        engine = one_kind.engine(rows=2, stop_tokens=[])
        assert texts(engine, prompts, 12, Sampling(processors=(processor(),))) == expected
    assert set(engine.steps) == {0} and "there is no drafting" in caplog.text
    assert expected != texts(engine, prompts, 12, Sampling())


def test_a_processor_is_called_with_the_exact_text(one_kind):
    class Recorder(tf.LogitsProcessor):
        stateless = True

        def __init__(self) -> None:
            self.seen: list[tuple[int, ...]] = []

        def __call__(self, input_ids, scores):
            assert input_ids.shape[0] == scores.shape[0] == 1
            self.seen.append(tuple(input_ids[0].tolist()))
            return scores

    recorder = Recorder()
    ((_, result),) = one_kind.engine(stop_tokens=[]).generate([PROMPT], 20, sampling=Sampling(processors=(recorder,)))
    text = PROMPT + result.tokens
    for end in range(len(PROMPT), len(text)):
        assert tuple(text[:end]) in recorder.seen


def test_the_scores_that_are_kept_are_those_that_chose(one_kind, prompts):
    sampling = Sampling(temperature=0.8, top_k=6, seed=2)
    for model_engine in (one_kind.engine(rows=3, stop_tokens=[]), one_kind.engine(rows=3, heads=1, stop_tokens=[]),
                         one_kind.engine(rows=3, stop_tokens=[], tree=Tree(nodes=6))):  # fmt: skip
        for index, result in model_engine.generate(prompts, 12, sampling=sampling, keep_scores=True):
            ids = torch.tensor([prompts[index] + result.tokens])
            with torch.no_grad():
                logits = one_kind.base(ids).logits[0, len(prompts[index]) - 1 : -1].float()
            torch.testing.assert_close(torch.stack(result.logits), logits, rtol=1e-3, atol=1e-3)
            assert len(result.scores) == len(result.tokens) == 12
            assert all(int(score.isfinite().sum()) == 6 for score in result.scores)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"method": "x"},
    ],
)
def test_sampling_that_means_nothing_is_refused(wrong):
    with pytest.raises(SamplingError, match=next(iter(wrong))):
        Sampling(**wrong)
