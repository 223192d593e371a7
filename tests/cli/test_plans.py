"""What the verbs assume where nothing is said is what the rooms assume."""

from __future__ import annotations

from gemcut.cli.plans import heads
from gemcut.score.heads import HEAD_CRITERIA, HEAD_DEFAULT


def test_heads_are_planned_by_the_default_criterion() -> None:
    default = {parameter.name: parameter.default for parameter in heads.params}["criterion"]
    assert default == HEAD_DEFAULT
    assert not HEAD_CRITERIA[HEAD_DEFAULT].measured  # statistics alone are enough
