"""Every failure a user can cause or meet, with its exit code.

GemcutError
├─ UsageError       2   a recipe, flag or reference to something that does not exist
├─ MissingError     3   a package, token, device, disk space or memory is absent
├─ CheckpointError  4   bytes disagree with header, index, config, plan or hash
├─ QualityError     5   a canary, KLD gate or coverage gate failed; the work is kept
└─ ToolError        6   an outside tool failed: command, code, last lines
anything else       1   a bug
"""

from __future__ import annotations


class GemcutError(Exception):
    """A failure that says what, where, got and wanted, and what to do next, in at most four lines."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        wanted: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.wanted = wanted
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  at     {self.where}")
        if self.got is not None or self.wanted is not None:
            sides = []
            if self.got is not None:
                sides.append(f"got {self.got}")
            if self.wanted is not None:
                sides.append(f"wanted {self.wanted}")
            lines.append("  found  " + ", ".join(sides))
        if self.hint is not None:
            lines.append(f"  next   {self.hint}")
        return "\n".join(lines)


class UsageError(GemcutError):
    """A recipe, flag or reference to something that does not exist."""

    exit_code = 2


class MissingError(GemcutError):
    """A package, token, device, disk space or memory is absent."""

    exit_code = 3


class CheckpointError(GemcutError):
    """Bytes disagree with a header, an index, a config, a plan or a hash."""

    exit_code = 4


class QualityError(GemcutError):
    """A canary, KLD gate or coverage gate failed. The work is kept."""

    exit_code = 5


class ToolError(GemcutError):
    """An outside tool failed: command, exit code, last lines."""

    exit_code = 6
