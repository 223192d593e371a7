"""Exit codes and the four-line form."""

from __future__ import annotations

import pytest

from gemcut import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.MissingError, 3),
        (errors.CheckpointError, 4),
        (errors.QualityError, 5),
        (errors.ToolError, 6),
    ],
)
def test_exit_codes(kind: type[errors.GemcutError], code: int) -> None:
    assert kind("x").exit_code == code


def test_form_is_at_most_four_lines() -> None:
    error = errors.UsageError("what", where="where", got=1, wanted=2, hint="do this")
    lines = str(error).splitlines()
    assert len(lines) == 4
    assert lines[0] == "what"
    assert "got 1, wanted 2" in lines[2]
    assert lines[3].endswith("do this")


def test_tree_in_the_docstring_is_the_tree() -> None:
    for kind in errors.GemcutError.__subclasses__():
        assert f"{kind.__name__:<16} {kind.exit_code} " in (errors.__doc__ or "")
