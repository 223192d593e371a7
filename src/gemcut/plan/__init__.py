"""Scores + budget + guards → Plan. Pure: no disk, no torch."""

from gemcut.families.heads import legal_head_counts
from gemcut.plan.difference import LayerDifference, PlanDiff, diff_plans
from gemcut.plan.experts import Planned, kept_matrix, plan_experts
from gemcut.plan.explain import ClassUse, Explanation, Neighbour, Standing, explain
from gemcut.plan.guards import Guarded, Guards, super_experts
from gemcut.plan.heads import PlannedHeads, plan_heads

__all__ = [
    "ClassUse",
    "Explanation",
    "Guarded",
    "Guards",
    "LayerDifference",
    "Neighbour",
    "PlanDiff",
    "Planned",
    "PlannedHeads",
    "Standing",
    "diff_plans",
    "explain",
    "kept_matrix",
    "legal_head_counts",
    "plan_experts",
    "plan_heads",
    "super_experts",
]
