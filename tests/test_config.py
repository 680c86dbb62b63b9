from __future__ import annotations

import pytest

from nextn.config import ConfigError, MultiTokenConfig


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
        ({"n": 1}, "at least 2"),
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
