"""Importance matrices: from the statistics of a pass, from llama.cpp's files, merged, judged by the real quantisers."""

from gemcut.export.imatrix.auto import Choice, choose
from gemcut.export.imatrix.entries import Entry, Imatrix, Inputs, Variant, fit, missing_entries, wants_importance
from gemcut.export.imatrix.file import read_imatrix, write_imatrix
from gemcut.export.imatrix.merge import merge, refuse_unaddable
from gemcut.export.imatrix.starved import PRIOR_TOKENS, Coverage, TensorCoverage, coverage, gate
from gemcut.export.imatrix.statistics import from_statistics, presumed
from gemcut.export.imatrix.take import take
from gemcut.export.imatrix.variants import FORMULAS

__all__ = [
    "FORMULAS",
    "PRIOR_TOKENS",
    "Choice",
    "Coverage",
    "Entry",
    "Imatrix",
    "Inputs",
    "TensorCoverage",
    "Variant",
    "choose",
    "coverage",
    "fit",
    "from_statistics",
    "gate",
    "merge",
    "missing_entries",
    "presumed",
    "read_imatrix",
    "refuse_unaddable",
    "take",
    "wants_importance",
    "write_imatrix",
]
