"""Flags that several verbs share, declared once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from gemcut.cli.console import Talk

F = TypeVar("F", bound=Callable[..., Any])


def talk(function: F) -> F:
    """--json, -q and -v; the command gets one `talk` argument."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Print only the path of the result.")
    @click.option("-v", "--verbose", count=True, help="More talk on stderr.")
    @functools.wraps(function)
    def command(*args: Any, as_json: bool, quiet: bool, verbose: int, **kwargs: Any) -> Any:
        voice = Talk(json=as_json, quiet=quiet, verbose=verbose)
        try:
            return function(*args, talk=voice, **kwargs)
        finally:
            voice.close()

    return command  # type: ignore[return-value]


class OutPath(click.Path):
    """A place to write, whose names are not longer than a file system takes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path as it is."""
        from gemcut.errors import UsageError
        from gemcut.store import MAX_NAME_BYTES

        found = super().convert(value, param, ctx)
        for part in str(found).split(os.sep):
            if len(os.fsencode(part)) > MAX_NAME_BYTES:
                got, wanted = f"{len(os.fsencode(part))} bytes", f"at most {MAX_NAME_BYTES}"
                raise UsageError("a name in -o is too long", where=f"{part[:60]}…", got=got, wanted=wanted)
        return found


force = click.option("--force", is_flag=True, help="Replace an existing output.")
dry_run = click.option("--dry-run", is_flag=True, help="Say what would be read, written and needed; do nothing.")
device = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1.")
max_tokens = click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Whole items, class by class in turn, up to this many."
)
observe_fields = click.option(
    "--set", "sets", multiple=True, metavar="PATH=VALUE", help="Another observe field, e.g. dtype=float32."
)
out_folder = click.option("-o", "--out", required=True, type=OutPath(), help="The folder to write.")


def refuse(*names: str, wanted: str) -> None:
    """Parameters that would change nothing here, so that nobody believes they did.

    Raises:
        UsageError: one of them was given.
    """
    from gemcut.errors import UsageError

    context = click.get_current_context()
    for option in context.command.params:
        if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"{option.opts[0]} would change nothing here", wanted=wanted)
