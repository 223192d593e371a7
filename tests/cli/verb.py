"""A verb as a user calls it."""

from __future__ import annotations

import pytest

from gemcut.cli.main import main


def gemcut(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a traceback is a bug."""
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    code = end.value.code
    assert isinstance(code, int)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return code, shown.out, shown.err
