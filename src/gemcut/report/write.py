"""Write page, card and figures as one folder: all of it or none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from gemcut.errors import QualityError
from gemcut.report.data import ReportData
from gemcut.report.text import find_path
from gemcut.store import atomic_folder, write_bytes

FIGURES = "figures"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReportFiles:
    """Where the report lies."""

    index_html: Path
    card: Path
    figures: tuple[Path, ...]


def write_report(data: ReportData, folder: Path, *, force: bool = False) -> ReportFiles:
    """Render and write `index.html`, `README.md` and `figures/*.svg`; the same data give the same bytes.

    Raises:
        UsageError: `folder` exists and `force` is not set.
        QualityError: a local path is about to be published; nothing is written.
    """
    # here, because matplotlib and jinja2 take most of a second and the verbs that only want tables do not need them
    from gemcut.report.card import render_card
    from gemcut.report.figures import draw_all
    from gemcut.report.html import render_page
    from gemcut.report.pareto import draw_quants

    drawings = (*draw_all(data), *(draw_quants(data.quants) if data.quants is not None else ()))
    texts = {"index.html": render_page(data, drawings), "README.md": render_card(data, drawings, FIGURES)}
    texts |= {f"{FIGURES}/{drawing.name}.svg": drawing.svg for drawing in drawings}
    for name, text in texts.items():
        if (path := find_path(text)) is not None:
            raise QualityError(
                "a local path would be published", where=name, got=path, hint="name it without its folder"
            )
    with atomic_folder(folder, force=force) as partial:
        for name, text in texts.items():
            write_bytes(partial / name, text.encode())
    _log.info("report with %d figures written", len(drawings))
    return ReportFiles(
        folder / "index.html",
        folder / "README.md",
        tuple(folder / FIGURES / f"{drawing.name}.svg" for drawing in drawings),
    )
