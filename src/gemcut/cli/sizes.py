"""Tables that several verbs show: sizes, and what a dry run found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from gemcut.cli.console import Talk

if TYPE_CHECKING:
    from gemcut.preflight import Preflight


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", re.IGNORECASE)


class ByteSize(click.ParamType[int]):
    """`10GiB`, `500MB`, `2G` (thousands without the i) or plain bytes, as an integer."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, at least 1."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None or float(match[1]) * unit < 1:
            self.fail(f"{str(value)!r} is not a size; write 10GiB, 500MB or a number of bytes", param, ctx)
        return int(float(match[1]) * unit)


def size(size_bytes: float | None) -> str:
    """Bytes for people: MiB below one GiB, GiB above."""
    if size_bytes is None:
        return ""
    if size_bytes < 2**20:
        return f"{size_bytes / 2**10:.1f} KiB"
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes < 2**30 else f"{size_bytes / 2**30:.2f} GiB"


def show_preflight(talk: Talk, found: Preflight) -> None:
    """Stages, bytes, disk, memory and time; nothing was done."""
    talk.table(
        "Dry run: nothing was written",
        ("stage", "state", "reads", "writes", "peak memory", "time"),
        [
            (
                stage.name,
                stage.state,
                size(stage.read_bytes),
                size(stage.write_bytes),
                size(stage.memory_bytes),
                "" if stage.seconds is None else duration(stage.seconds),
            )
            for stage in found.stages
        ],
        note=(
            f"disk: {size(found.write_bytes)} needed, {size(found.free_bytes)} free; "
            f"memory: {size(found.memory_bytes)} needed, {size(found.available_bytes)} available; {found.basis}"
        ),
    )
    talk.result(found, text="")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
