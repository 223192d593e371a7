"""One self-contained HTML page: inline CSS and SVG, no script, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from gemcut.report import method, parts, tables
from gemcut.report.changes import component_rows
from gemcut.report.data import Drawing, ReportData
from gemcut.report.text import plain


@dataclass(frozen=True, slots=True)
class FigureView:
    """A drawing as the page shows it. The SVG was made by matplotlib, which escapes its text."""

    name: str
    caption: str
    svg: Markup


def _finalize(value: object) -> object:
    """Everything that the template prints and that is not markup of ours goes through `plain`."""
    if isinstance(value, Markup):
        return value
    return plain(str(value)) if value is not None else ""


def environment() -> jinja2.Environment:
    """Autoescaped, strict about missing names."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("gemcut.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_finalize,
    )


def render_page(data: ReportData, drawings: Sequence[Drawing]) -> str:
    """The whole page as text. The same data and drawings give the same bytes."""
    figures = {drawing.name: FigureView(drawing.name, drawing.caption, Markup(drawing.svg)) for drawing in drawings}
    checks_pass = all(check.passed for check in data.checks)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            **parts.shared(data),
            key_figures=tables.key_figures(data),
            figures=figures,
            doubts=tables.doubt_rows(data),
            near_ties=tables.near_ties(data),
            dropped=tables.dropped_rows(data),
            components=component_rows(data.base, data.candidate),
            stages=method.stage_rows(data),
            units=tables.units_name(data),
            checks_pass=checks_pass,
        )
    )
