"""What the page and the card print alike."""

from __future__ import annotations

from gemcut.report import changes, method, tables
from gemcut.report import nvfp4 as packed
from gemcut.report import quants as made
from gemcut.report.data import ReportData

_QUANTS = ("quants", "quants_short", "quant_classes", "mixes", "memory", "sums")


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
        **(_quants(data.quants) if data.quants is not None else dict.fromkeys(_QUANTS)),
        **_nvfp4(data),
    }


def _nvfp4(data: ReportData) -> dict[str, object]:
    """Damage by class stands here only where the rest of the report is about something else."""
    one = data.nvfp4
    return {
        "nvfp4_headline": packed.nvfp4_headline(one) if one is not None else None,
        "nvfp4_parts": packed.part_rows(one) if one is not None else None,
        "nvfp4_costs": packed.cost_rows(one) if one is not None and not data.only_nvfp4 else None,
    }


def _quants(quants: made.Quants) -> dict[str, object]:
    rows = (
        made.quant_rows(quants),
        made.quant_rows(quants, short=True),
        made.class_quant_rows(quants),
        made.make_rows(quants),
        made.memory_rows(quants),
        made.sum_rows(quants),
    )
    return dict(zip(_QUANTS, rows, strict=True))
