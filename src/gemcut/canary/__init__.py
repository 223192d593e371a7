"""Does the model still talk? Fixed prompts, greedy answers of base and candidate, detectors, a verdict.

Teacher-forced losses stay fine while generation collapses, and a collapse may show only without a BOS: so both models
answer freely, under six conditions, and the base is the yardstick of each.
"""

from gemcut.canary.judge import judge, refuse_failed, worst
from gemcut.canary.run import CANARY, against, base_of, check_pair, run_canary
from gemcut.canary.settings import CanarySettings, Limits

__all__ = [
    "CANARY",
    "CanarySettings",
    "Limits",
    "against",
    "base_of",
    "check_pair",
    "judge",
    "refuse_failed",
    "run_canary",
    "worst",
]
