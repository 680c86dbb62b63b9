"""How far to draft: what is fastest by the times of the machine and by what drafts bring."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import greedy_reference
from nextn.decoding import building
from nextn.decoding.pace import (
    ALIKE,
    CHOOSE_EVERY,
    FIRST_LOOK,
    RECHECK,
    SHARED_WEIGHT,
    TREE,
    Pace,
    Profile,
    Tally,
    largest,
)
from nextn.store import Store

CHEAP = Profile({0: 1.0, 1: 1.15, 2: 1.2, 3: 1.25})
DEAR = Profile({0: 1.0, 1: 2.1, 2: 3.0, 3: 3.9})


def told(pace: Pace, accepted: list[int], steps: int, waiting: bool = False) -> list[int]:
    """What it chooses while each row accepts so many of the drafts that it is offered."""
    chosen, texts = [], [Tally.empty(pace.drafts) for _ in accepted]
    for _ in range(steps):
        behind = len(chosen) > 2 and not any(chosen[-3:])
        choice = pace.choose([(text, 100) for text in texts], waiting, behind)
        stood = [min(count, choice) if choice != TREE else count for count in accepted]
        pace.note(choice, list(zip(texts, stood, strict=True)))
        chosen.append(choice)
    return chosen


def test_good_drafts_on_an_idle_machine_are_all_taken():
    chosen = told(Pace(3, CHEAP), [3, 3, 3], 200)
    assert set(chosen) == {0, 3}
    plain = [step for step, choice in enumerate(chosen, start=1) if not choice]
    assert plain == [*range(RECHECK, 201, RECHECK)]  # one is timed again


def test_plain_steps_that_were_slow_at_first_are_found_out():
    pace, text, profile = Pace(3, Profile({0: 1.0, 1: 1.6})), Tally.empty(3), {0: 1.0, 1: 1.6}
    chosen = []
    for _ in range(300):
        chosen.append(pace.choose([(text, 100)], kind="scores"))
        slow = 2.0 if len(chosen) < 4 else 1.0
        pace.note(chosen[-1], [(text, len(chosen) % 2 and chosen[-1])], slow * profile[chosen[-1]], kind="scores")
    assert 1 in chosen and not any(chosen[100:120]) and chosen.count(1) < 60


def test_drafts_that_are_never_right_are_left_and_seldom_tried_again():
    chosen = told(Pace(3, CHEAP), [0, 0], 1000)
    assert not any(chosen[30:60]) and 0 < sum(map(bool, chosen)) < 60
    assert sum(map(bool, chosen[500:])) <= 15


def test_where_a_token_more_costs_a_step_more_there_are_plain_steps():
    assert not any(told(Pace(3, DEAR), [2, 1], 300))


def test_the_depth_follows_what_the_second_draft_brings():
    chosen = told(Pace(3, Profile({0: 1.0, 1: 1.25, 2: 1.65, 3: 2.05})), [1, 1], 200)
    again = [*range(RECHECK, 201, RECHECK)]  # a plain step is timed again
    assert set(chosen[50:]) == {0, 1} and chosen[50:].count(0) == len([step for step in again if step > 50])
    assert chosen[RECHECK - 1] == 0


def test_it_comes_back_when_drafts_are_right_again():
    pace = Pace(3, CHEAP)
    assert told(pace, [0], 200)[-1] == 0
    assert told(pace, [3], 600)[-1] == 3


def test_running_acceptance_is_conditional():
    pace = Pace(3, CHEAP)
    told(pace, [3, 1, 0, 0], 400, waiting=True)
    assert pace.acceptance == pytest.approx([0.5, 0.5, 1.0], abs=0.02)
    assert pace.tokens(Tally.empty(pace.drafts), 3) == pytest.approx(1 + 0.5 + 0.25 + 0.25, abs=0.03)


def test_a_text_counts_its_own_tries_and_leans_on_the_others_for_the_rest():
    pace = Pace(1, CHEAP)
    told(pace, [1, 0], 400, waiting=True)
    text = Tally.empty(pace.drafts)
    assert pace.tokens(text, 1) == pytest.approx(1.5, abs=0.02)
    for _ in range(4):
        text.note(1, 1, 1e9)
    assert pace.tokens(text, 1) == pytest.approx(1 + (4 + 8 * 0.5) / 12, abs=0.02)


def test_what_counts_is_the_last_text_to_end_unless_others_wait_for_its_slot():
    profile = Profile({0: 1.0, 3: 1.6})
    pace = Pace(3, profile)
    told(pace, [3, 0], 300, waiting=True)  # 2.5 tokens on the average
    good, bad = Tally.empty(pace.drafts), Tally.empty(pace.drafts)
    for _ in range(50):
        good.note(3, 3, 1e9)
        bad.note(3, 0, 1e9)
    assert pace.choose([(good, 100), (bad, 100)], waiting=True) == 3
    assert pace.choose([(good, 100), (bad, 100)]) == 0
    assert pace.choose([(good, 400), (bad, 100)]) == 3


def test_a_text_is_left_to_plain_steps_while_another_is_drafted():
    pace = Pace(3, Profile({0: 1.0, 3: 1.5}))
    assert told(pace, [3], 60)[-1] == 3
    assert told(pace, [0], 40)[-1] == 0
    assert told(pace, [3], 5) == [3] * 5


def test_after_texts_that_were_left_the_next_one_is_not_drafted_on_what_others_brought():
    pace = Pace(1, Profile({0: 1.0, 1: 1.25}))
    assert told(pace, [1], 60)[-1] == 1
    assert pace.choose([(Tally.empty(1), 100)], behind=True) == 1
    for _ in range(2):
        assert told(pace, [0], 60)[-1] == 0
    assert pace.least_acceptance[0] < pace.acceptance[0] < 0.4
    assert pace.choose([(Tally.empty(1), 100)], behind=True) == 0


def test_what_greedy_texts_accept_says_nothing_of_drawn_ones():
    pace, text = Pace(1, Profile({0: 1.0, 1: 1.25})), Tally.empty(1)
    assert told(pace, [1], 100)[-1] == 1
    for _ in range(8):
        pace.note(pace.choose([(text, 100)], kind="scores"), [(text, 0)], 1.0, kind="scores")
    for _ in range(30):
        pace.note(1, [(text, 0)], 1.25, kind="scores")
    assert pace.choose([(Tally.empty(1), 100)], kind="scores") == 0
    assert pace.choose([(Tally.empty(1), 100)]) == 1


def test_where_drawing_takes_time_drafts_bring_less_from_the_first_step_on():
    greedy, drawn = {0: 1.0, 1: 1.6}, 1.5

    def first(profile: Profile) -> int:
        pace, text = Pace(1, profile), Tally.empty(1)
        for _ in range(8):
            pace.note(pace.choose([(text, 100)], kind="scores"), [(text, 0)], drawn, kind="scores")
        return pace.choose([(text, 100)], kind="scores")

    assert first(Profile(greedy)) == 1  # believed to take 1.6 plain steps for 1.7 tokens
    # It takes (1.6 + 1.7 * 0.5) / 1.5 = 1.63 plain ones: every token that is emitted must be drawn.
    profile = Profile(greedy, drawn=drawn)
    assert first(profile) == 0 and Pace(1, profile).over_plain("scores", 1) == pytest.approx(2.45 / 1.5)
    assert Pace(1, profile).choose([(Tally.empty(1), 100)]) == 1


def test_deeper_drafts_are_tried_again():
    pace = Pace(3, Profile({0: 1.0, 1: 1.25, 2: 1.55, 3: 1.85}))
    assert told(pace, [1, 1], 100)[-1] == 1
    assert told(pace, [3, 3], 400)[-1] == 3


def test_one_slow_step_decides_nothing():
    pace, text = Pace(3, CHEAP), Tally.empty(3)
    for _ in range(20):
        pace.note(3, [(text, 3)], 1.25)
    pace.note(3, [(text, 3)], 60.0)
    assert pace.choose([(text, 100)]) == 3


@pytest.mark.parametrize("slow", range(3))
def test_one_slow_step_at_the_beginning_decides_nothing(slow):
    profile = Profile({0: 1.0, 3: 1.6})
    for kind in ("greedy", "scores"):
        good, bad = Pace(3, profile), Pace(3, profile)
        for pace, stood in ((good, 2), (bad, 0)):
            text, chosen = Tally.empty(3), []
            for step in range(60):
                choice = pace.choose([(text, 100)], kind=kind)
                seconds = (3.0 if step == slow else 1.0) * profile.step[choice]
                pace.note(choice, [(text, min(stood, choice))], seconds, kind=kind)
                chosen.append(choice)
            assert set(chosen[12 : RECHECK - 1]) == ({3} if stood else {0})


def test_one_slow_catching_up_decides_nothing_and_many_do_until_they_are_old():
    pace, text = Pace(3, Profile({0: 1.0, 3: 1.6})), Tally.empty(3)
    told(pace, [3], 20)
    pace.note(3, [(text, 3)], 1000.0, behind=True)
    assert pace.choose([(text, 100)], behind=True) == 3
    for _ in range(4):
        pace.note(3, [(text, 3)], 1000.0, behind=True)
    chosen = [pace.choose([(text, 100)], behind=True) for _ in range(8 * FIRST_LOOK)]
    assert chosen.index(3) + 1 > 2 * FIRST_LOOK and (chosen.index(3) + 1) % FIRST_LOOK == 0


def test_a_slower_machine_is_slower_for_all_steps():
    pace, text = Pace(3, Profile({0: 1.0, 3: 1.6})), Tally.empty(3)
    for _ in range(40):
        pace.note(3, [(text, 2)], 1.6)
    for _ in range(40):
        pace.note(3, [(text, 2)], 4.8)
    assert pace.choose([(text, 100)]) == 3
    for _ in range(60):  # while these took as long as before
        pace.note(3, [(text, 2)], 4.8)
        pace.note(0, [(text, 0)], 1.0)
    assert pace.choose([(text, 100)]) == 0


def test_what_drafts_take_over_plain_steps_is_found_out_while_the_machine_grows_slower():
    pace, text, real = Pace(1, Profile({0: 1.0, 1: 1.1})), Tally.empty(1), {0: 1.0, 1: 1.6}
    chosen = []
    for step in range(200):
        chosen.append(pace.choose([(text, 100)]))
        pace.note(chosen[-1], [(text, step % 2 and chosen[-1])], real[chosen[-1]] * 1.01**step)
    assert all(chosen[: RECHECK - 1]) and not any(chosen[3 * RECHECK : 3 * RECHECK + 20])


def test_drafting_that_must_first_catch_up_has_to_bring_that_too():
    pace, text = Pace(3, Profile({0: 1.0, 3: 1.6})), Tally.empty(3)
    for _ in range(30):
        pace.note(3, [(text, 1)], 1.6)
    for _ in range(4):
        pace.note(3, [(text, 1)], 21.6, behind=True)
    assert pace.choose([(text, 100)]) == 3 == pace.choose([(text, 200)], behind=True)
    assert pace.choose([(text, 50)], behind=True) == 0


def test_after_catching_up_a_few_misses_do_not_end_the_drafting():
    pace, text = Pace(3, CHEAP), Tally.empty(3)
    pace.note(0, [(text, 0)], 1.0)
    chosen = []
    for _ in range(20):
        chosen.append(pace.choose([(text, 100)], behind=not chosen or not chosen[-1]))
        pace.note(chosen[-1], [(text, 0)])
    assert all(chosen[:9]) and not any(chosen[15:])


def test_several_texts_say_sooner_what_drafts_bring():
    pace, texts = Pace(3, CHEAP), [Tally.empty(3) for _ in range(4)]
    pace.choose([(text, 100) for text in texts])
    for text in texts:
        text.note(3, 0, 1e9)
    chosen = []
    for _ in range(12):
        chosen.append(pace.choose([(text, 100) for text in texts], behind=not chosen or not chosen[-1]))
        pace.note(chosen[-1], [(text, 0) for text in texts])
    assert all(chosen[:3]) and not any(chosen[4:])


def test_drafts_are_tried_again_one_at_first_and_where_a_text_is_long_enough_for_good_ones_to_pay():
    pace, text = Pace(3, CHEAP), Tally.empty(3)
    told(pace, [0], 60)
    for _ in range(5):
        pace.note(1, [(text, 0)], CHEAP.step[1] + 10.0, behind=True)
    assert not any(pace.choose([(text, 8)], behind=True) for _ in range(FIRST_LOOK))
    assert pace.choose([(Tally.empty(3), 100)], behind=True) == 1


def test_plain_steps_of_the_same_texts_are_chosen_together():
    pace, text = Pace(3, CHEAP), Tally.empty(3)
    told(pace, [3], 100)
    assert not pace.stays_plain()
    for _ in range(300):
        text.note(3, 0, 1e9)
    assert not pace.choose([(text, 100)], behind=True)
    assert [pace.stays_plain() for _ in range(CHOOSE_EVERY)].index(False) == CHOOSE_EVERY - 2
    for _ in range(3000):
        text.note(3, 3, 1e9)
    assert pace.choose([(text, 100)], behind=True) == 3 and not pace.stays_plain()


def test_an_engine_asks_again_when_a_text_comes(trained_model, prompts):
    asked = []

    class Plain(Pace):
        def choose(self, texts, *rest):
            asked.append(len(texts))
            self._left_plain, self._plain_steps = True, self._plain_steps + 1
            return 0

    engine = trained_model.engine(rows=2, depth="auto", stop_tokens=[])
    engine.paces = {2: Plain(engine.n - 1, CHEAP)}
    found = dict(engine.generate(prompts[:3], [4, 30, 30]))
    assert asked == [2, 2, 2, 1, 1] and engine.steps == {0: 32}  # at steps 1, 4, 16, 30 and 32
    assert [found[row].tokens for row in range(3)] == [
        greedy_reference(trained_model.base, prompt, limit) for prompt, limit in zip(prompts, [4, 30, 30], strict=False)
    ]


def test_where_drafts_bring_as_much_as_they_cost_everything_stays_as_it_is():
    for before, choice in ((1, 1), (0, 0)):
        pace, text = Pace(1, Profile({0: 1.0, 1: 1.25})), Tally.empty(1)
        for _ in range(60):
            pace.note(1, [(text, before)])
        assert pace.choose([(text, 100)]) == choice
        for _ in range(200):
            for count in (1, 0, 0, 0):
                pace.note(1, [(text, count)])
        assert pace.choose([(text, 100)]) == choice


def test_a_tree_is_read_where_it_gives_more_for_its_time():
    profile = Profile({0: 1.0, 3: 1.5}, tree=1.4)
    assert told(Pace(3, profile, tree=2.2), [3], 100)[-1] == 3
    pace = Pace(3, profile, tree=3.5)
    assert told(pace, [2], 100)[-1] == TREE


def test_a_profile_is_measured_once_and_kept(trained_model, prompts, monkeypatch, tmp_path):
    monkeypatch.setattr(building, "cache_directory", lambda: tmp_path)
    engine = trained_model.engine(rows=3, stop_tokens=[], depth="auto")
    engine.paces.clear()
    found = dict(engine.generate(prompts, 20))
    profile = engine.pace.profile
    assert set(profile.step) == {0, 1, 2, 3} and profile.tree is None
    assert all(seconds > 0 for seconds in [*profile.step.values(), profile.drawn])
    (kept,) = (tmp_path / "profiles").iterdir()
    store, key = Store(kept.parent, ".json"), kept.name.split(".")[0]
    assert Profile.read(store, key) == profile == building.measure(engine, 3)
    store.put(key, b"{")
    assert Profile.read(store, key) is None
    for index, prompt in enumerate(prompts):
        assert found[index].tokens == greedy_reference(trained_model.base, prompt, 20)
    assert sum(engine.steps.values()) > 0


def test_a_depth_that_there_is_not_is_refused(trained_model):
    for wrong in (4, -1, "all"):
        with pytest.raises(ValueError, match="depth is"):
            trained_model.engine(depth=wrong)


@pytest.mark.parametrize(
    "numbers", [[(3.0, 0.0)], [(3.0, 2.0)] * 8, [(5.0, 4.0), (9.0, 0.0), (7.0, 1.0)], [(1, 0), (4, 0)]]
)
def test_the_largest_of_many_is_larger_than_each_is_on_the_average(numbers):
    drawn = np.random.default_rng(0).normal(
        [mean for mean, _ in numbers], [var**0.5 for _, var in numbers], (100_000, len(numbers))
    )
    assert largest(numbers) == pytest.approx(drawn.max(axis=1).mean(), abs=0.03)


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_steps_to_the_end_of_a_text_and_how_much_they_vary(drafts):
    """Against texts whose acceptance is drawn as it is believed to be."""
    pace, text, left = Pace(3, Profile(dict.fromkeys(range(4), 1.0))), Tally.empty(3), 200
    for _ in range(400):
        pace.note(3, [(text, 1), (text, 3), (text, 0), (text, 3)], 1.0)
    shares = text.acceptance(pace.acceptance, SHARED_WEIGHT)
    tries, random = text.tries[0] + ALIKE - 1, np.random.default_rng(0)
    needed = []
    for first in random.beta(shares[0] * tries, (1 - shares[0]) * tries, 3000):
        stands = random.random((left, 3)) < [first, *shares[1:]]
        emitted = 1 + stands[:, :drafts].cumprod(axis=1).sum(axis=1)
        needed.append(np.searchsorted(emitted.cumsum(), left) + 1)
    mean, variance = pace.steps(text, left, drafts, pace.acceptance)
    assert mean == pytest.approx(np.mean(needed), rel=0.02)
    assert variance == pytest.approx(np.var(needed), rel=0.15)


def test_many_texts_of_which_the_slowest_decides_must_accept_more():
    def choice(rows: int, waiting: bool) -> int:
        pace = Pace(1, Profile({0: 1.0, 1: 1.3}))
        texts = [(Tally.empty(1), 60) for _ in range(rows)]
        for text, _ in texts:
            for _ in range(60 // rows):
                pace.note(1, [(text, 1)], 1.3)
                pace.note(1, [(text, 0)], 1.3)
        return pace.choose(texts, waiting)

    # 1.5 tokens for 1.3 steps, but the slowest of eight texts gets some 1.35.
    assert choice(1, False) == choice(8, True) == 1 and choice(8, False) == 0
