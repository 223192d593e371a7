"""What a solved size is refused for, before minutes are spent."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemcut.checkpoint import open_checkpoint
from gemcut.errors import UsageError
from gemcut.export.imatrix import presumed
from gemcut.export.layout import layout_of
from gemcut.export.mix.overrides import decided, parse_overrides
from gemcut.exporting import GgufWords, plan_export
from gemcut.mixing import Budget, MixWords, solvable
from tiny import make_tiny


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_size_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path, kind: str) -> None:
    """There is no curvature to measure by: the refusal comes before it is opened."""
    checkpoint = open_checkpoint(make_tiny(tmp_path / kind, f"{kind}-text"))
    words = MixWords((1 << 10,), curvature=tmp_path / "none", damages=tmp_path / "damages.json")
    with pytest.raises(UsageError, match="no mix of these types is so small") as refused:
        plan_export(checkpoint, GgufWords((), mix=words))
    assert (refused.value.where, refused.value.got) == ("1KiB", "a budget of 1024 bytes")
    assert not (tmp_path / "damages.json").exists()
    least = int(str(refused.value.wanted).split()[2])
    with pytest.raises(UsageError, match="curvature"):
        plan_export(checkpoint, GgufWords((), mix=MixWords((least,), curvature=tmp_path / "none")))


def test_types_by_hand_and_importances_move_what_is_possible(tmp_path: Path) -> None:
    layout = layout_of(open_checkpoint(make_tiny(tmp_path / "m", "dense-text", hidden_size=256)))
    plain = solvable(layout, (), 0, None, {})
    weighed = solvable(layout, (), 0, presumed(layout), {})
    assert weighed[0] < plain[0]
    assert weighed[1] == plain[1]
    wide = solvable(layout, (), 0, None, decided(layout, parse_overrides(["attn_k=f16"])))
    assert wide[0] > plain[0]
    assert wide[1] > plain[1]
    one = Budget("x", weighed[0])
    assert solvable(layout, (one,), 0, presumed(layout), {}) == weighed
    with pytest.raises(UsageError, match="so small") as refused:
        solvable(layout, (one,), 0, None, {})
    assert "an importance matrix" in str(refused.value.hint)
    with pytest.raises(UsageError, match="so small") as refused:
        solvable(layout, (Budget("x", weighed[0] - 1),), 0, presumed(layout), {})
    assert "an importance matrix" not in str(refused.value.hint)
