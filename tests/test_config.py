from __future__ import annotations

import pytest

from nextn.config import ConfigError, MultiTokenConfig, ScheduleConfig, WeightsConfig


def test_weight_presets():
    def weights(**kwargs):
        return MultiTokenConfig(n=4, weights=kwargs).weights.by_depth(4)

    assert weights(preset="gloeckle") == [1, 1, 1, 1]
    assert weights(preset="deepseek", scale=0.3) == pytest.approx([1, 0.1, 0.1, 0.1])
    assert weights(preset="fastmtp", decay=0.6) == pytest.approx([0, 0.5102, 0.3061, 0.1837], abs=1e-4)


def test_taps_follow_the_school():
    assert MultiTokenConfig().tap == "post_norm"
    assert MultiTokenConfig(heads="parallel").tap == "before_last_layer"


@pytest.mark.parametrize(
    "bad, says",
    [
        ({"n": 1}, "nothing would be trained: set freeze_trunk to false, or n to at least 2"),
        ({"n": 0}, "n: must be at least 1 .*, not 0"),
        ({"n": -2}, "n: must be at least 1 .*, not -2"),
        ({"heads": "medusa"}, "heads"),
        ({"heads": "parallel", "recurrent": True}, "sequential heads only"),
        ({"output": {"kind": "trimmed"}}, "output.size"),
        ({"weights": {"preset": "list", "values": [1.0]}}, "1 entries, but n is 4"),
        ({"head": "parallel"}, "head"),
    ],
)
def test_bad_configs_get_a_sentence(bad, says):
    with pytest.raises(ConfigError, match=says):
        MultiTokenConfig(**bad)


def test_weights_follow_their_schedule():
    usual = WeightsConfig(preset="deepseek", scale=0.1)
    phases = [{"until": 0.5, "weights": {"preset": "deepseek", "scale": 0.4}}]
    schedule = ScheduleConfig(phases=phases)
    assert schedule.weights_at(0.49, usual, 3) == [1.0, 0.2, 0.2]
    assert schedule.weights_at(0.5, usual, 3) == [1.0, 0.05, 0.05]
    ones = WeightsConfig(preset="gloeckle")
    forward, reverse = (ScheduleConfig(curriculum=way) for way in ("forward", "reverse"))
    assert [forward.weights_at(at / 4, ones, 4) for at in range(4)] == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]  # fmt: skip
    assert [reverse.weights_at(at / 4, ones, 4) for at in range(4)] == [
        [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]  # fmt: skip
    late = ScheduleConfig(start=0.3)
    assert late.weights_at(0.29, ones, 3) == [1, 0, 0] and late.weights_at(0.3, ones, 3) == [1, 1, 1]
