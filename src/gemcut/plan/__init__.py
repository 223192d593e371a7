"""Scores + budget + guards → Plan. Pure: no disk, no torch."""

from gemcut.plan.difference import LayerDifference, PlanDiff, diff_plans
from gemcut.plan.experts import Planned, kept_matrix, plan_experts
from gemcut.plan.explain import ClassUse, Explanation, Neighbour, Standing, explain
from gemcut.plan.guards import Guarded, Guards, super_experts

__all__ = [
    "ClassUse",
    "Explanation",
    "Guarded",
    "Guards",
    "LayerDifference",
    "Neighbour",
    "PlanDiff",
    "Planned",
    "Standing",
    "diff_plans",
    "explain",
    "kept_matrix",
    "plan_experts",
    "super_experts",
]
