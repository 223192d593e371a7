"""What the page and the card print alike."""

from __future__ import annotations

from gemcut.report import changes, method, tables
from gemcut.report.data import ReportData


def shared(data: ReportData) -> dict[str, object]:
    """Names of both templates and what they stand for."""
    return {
        "data": data,
        "headline": tables.headline(data),
        "changed": method.manifest_sentence(data),
        "changes": changes.change_rows(data),
        "config": method.config_rows(data),
        "checks": method.check_rows(data),
        "criteria": tables.criteria_rows(data),
        "classes": tables.class_rows(data),
        "method": method.method_rows(data),
        "limits": method.limits(data),
        "files": method.file_rows(data),
    }
