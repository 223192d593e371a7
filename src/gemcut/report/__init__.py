"""The report room: one page, one model card, tables and figures from one `ReportData`."""

from gemcut.report.data import Check, CriterionNote, Drawing, Extra, KldEntry, ModelFacts, ReportData, StageTime, Table
from gemcut.report.nvfp4 import Nvfp4, Nvfp4Part
from gemcut.report.quants import Quant, Quants
from gemcut.report.write import ReportFiles, write_report

__all__ = [
    "Check",
    "CriterionNote",
    "Drawing",
    "Extra",
    "KldEntry",
    "ModelFacts",
    "Nvfp4",
    "Nvfp4Part",
    "Quant",
    "Quants",
    "ReportData",
    "ReportFiles",
    "StageTime",
    "Table",
    "write_report",
]
