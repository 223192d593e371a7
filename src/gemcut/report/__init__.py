"""The report room: one page, one model card, tables and figures from one `ReportData`."""

from gemcut.report.card import front_matter, render_card
from gemcut.report.data import Check, CriterionNote, KldEntry, ModelFacts, ReportData, StageTime
from gemcut.report.html import render_page
from gemcut.report.write import ReportFiles, write_report

__all__ = [
    "Check",
    "CriterionNote",
    "KldEntry",
    "ModelFacts",
    "ReportData",
    "ReportFiles",
    "StageTime",
    "front_matter",
    "render_card",
    "render_page",
    "write_report",
]
