"""The only printer. stdout carries results, stderr progress and talk."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(slots=True)
class Talk:
    """How loud this run is. One per command, made from its flags."""

    json: bool = False
    quiet: bool = False
    verbose: int = 0
    _bars: dict[str, tqdm[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        level = logging.WARNING if self.quiet else (logging.DEBUG if self.verbose > 1 else logging.INFO)
        root = logging.getLogger("gemcut")
        root.setLevel(level)
        # a second command in one process talks to the stderr of its own time
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        root.handlers[:] = [handler]
        root.propagate = False
        if self.verbose == 0:
            # transformers draws a bar for every layer it loads; ours is the one to watch
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "" if sys.stderr.isatty() else "1")

    def say(self, text: str) -> None:
        """A line of talk."""
        if not self.quiet:
            self.close()
            print(text, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, label: str) -> None:
        """One bar per label, on a terminal; finished bars stay, quiet and JSON runs draw none."""
        if self.quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        bar = self._bars.get(label)
        if bar is None:
            self.close()
            scaled = total > 100_000
            bar = tqdm(total=total, desc=label, unit="B" if scaled else "", unit_scale=scaled, leave=True)
            self._bars[label] = bar
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            del self._bars[label]

    def close(self) -> None:
        """End open bars, so that the next line does not run into them."""
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    def result(self, value: object, *, path: Path | str | None = None, text: str | None = None) -> None:
        """The result of the verb: JSON of the library's own dataclass, or only the path, or the text for people.

        An empty text prints nothing: the tables before it were the result.
        """
        self.close()
        if self.json:
            print(json.dumps(plain(value), indent=2, ensure_ascii=False))
        elif self.quiet:
            if path is not None:
                print(path)
        elif text is not None:
            if text:
                print(text)
        elif path is not None:
            print(path)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> None:
        """A table on stdout, for people only."""
        if self.json or self.quiet:
            return
        self.close()
        from rich import box
        from rich.console import Console
        from rich.table import Table

        grid = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", caption=note or None)
        grid.caption_justify = "left"
        cells = [[cell if isinstance(cell, str) else _cell(cell) for cell in row] for row in rows]
        for i, column in enumerate(columns):
            numeric = bool(cells) and all(not c[i] or c[i][0] in "0123456789+-−.[" for c in cells)
            grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            grid.add_row(*(_escape(c) for c in row))
        width = None if sys.stdout.isatty() else 180
        Console(file=sys.stdout, width=width, highlight=False).print(grid)


def fail(message: str) -> None:
    """An error, without a traceback."""
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    head = "\033[31merror:\033[0m " if colour else "error: "
    print(head + message, file=sys.stderr, flush=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def plain(value: object) -> Any:
    """Anything the library returns, as JSON can say it. NaN and infinity become null; folders lose their path."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    tolist = getattr(value, "tolist", None)
    if tolist is not None:
        return plain(tolist())
    return str(value)
