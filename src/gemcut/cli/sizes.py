"""Tables that several verbs show: sizes, and what a dry run found."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from gemcut.cli.console import Talk

if TYPE_CHECKING:
    from gemcut.preflight import Preflight


class ByteSize(click.ParamType[int]):
    """`10GiB`, `500MB`, `2G` (thousands without the i) or plain bytes, as an integer."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, at least 1."""
        if isinstance(value, int):
            return value
        from gemcut.vocabulary import size_bytes  # pydantic takes a while, and most verbs name no size

        try:
            return size_bytes(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


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
    if found.files:
        talk.table(
            "GGUF files",
            ("file", "", "bytes", "size", "bits per weight"),
            [(f.name, f.bound, f.size_bytes, size(f.size_bytes), f"{f.bits_per_weight:.3f}") for f in found.files],
        )
    talk.result(found, text="")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
