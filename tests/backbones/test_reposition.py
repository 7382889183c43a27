import pytest

from genfound import build
from genfound.tokenizers import PixelTokenizer
from tests.helpers import composed, fresh_nit

KEPT = {"rule": None, "trained": None, "target": None, "decouple": None}


def test_only_what_is_given_changes() -> None:
    net = fresh_nit()
    before = net.rope
    net.reposition(KEPT)
    assert net.rope == before
    net.reposition({**KEPT, "rule": "yarn", "trained": 8})
    assert (net.rope.rule, net.rope.trained, net.rope.decouple) == ("yarn", 8, before.decouple)


def test_a_network_without_rotary_positions_and_an_unknown_rule_are_refused() -> None:
    with pytest.raises(ValueError, match="rule=yarm is unknown"):
        fresh_nit().reposition({**KEPT, "rule": "yarm"})
    config = composed("model=dit_tiny", "tokenizer=pixel", "data=shapes")
    net = build.net(config, PixelTokenizer.spec, 10)
    with pytest.raises(ValueError, match=r"rope\.rule: DiT has no rotary positions"):
        net.reposition({**KEPT, "rule": "yarn"})
