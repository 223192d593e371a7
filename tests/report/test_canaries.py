"""A canary in a table: a row per condition, and the verdict in one line."""

from __future__ import annotations

from dataclasses import replace

from gemcut.records.canary import CanaryResult, ConditionVerdict
from gemcut.report.canaries import canary_checks, canary_tables
from gemcut.types import Estimate

SHARE = Estimate(0.25, 0.12, 0.45, 24)
FINE = ConditionVerdict("chat", True, 24, SHARE, SHARE, SHARE, 1, 3, 2.5, 10, 2, Estimate(1.5, 1.2, 1.8, 24), None,
                        True, ())  # fmt: skip
FAILED = replace(FINE, bos=False, nll_ratio=None, reasons=("too many",))
RESULT = CanaryResult("a" * 64, "b" * 64, "base", "cut", "c" * 64, "d" * 64, {}, "float32", {}, False, True, {},
                      (FINE, FAILED), ())  # fmt: skip


def test_a_row_per_condition() -> None:
    (extra,) = canary_tables(RESULT)
    assert "n = 24 prompts" in extra.text
    share = "25 % [12, 45]"
    assert extra.table.rows == (
        ("chat, BOS", share, share, share, "3 of 24", "1.500 [1.200, 1.800]", "passed"),
        ("chat, no BOS", share, share, share, "3 of 24", "–", "failed"),
    )
    assert canary_tables(None) == ()


def test_the_check_names_the_largest_ratio() -> None:
    (check,) = canary_checks(RESULT)
    assert not check.passed
    assert "2 conditions, 24 prompts each; largest NLL ratio 1.500" in check.detail
    assert canary_checks(None) == ()
