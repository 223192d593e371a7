"""The flow types on disk. Every reader checks the schema version first and trusts nothing in the file."""

from gemcut.records.gram import Gram, load_gram
from gemcut.records.importance import IMPORTANCE_SCHEMA, load_importance, save_importance
from gemcut.records.plans import BY_HAND, PLAN_SCHEMA, load_plan, plan_text, save_plan
from gemcut.records.results import (
    KLD_SCHEMA,
    MANIFEST_SCHEMA,
    kld_from_json,
    kld_to_json,
    load_kld,
    load_manifest,
    save_kld,
    save_manifest,
)
from gemcut.records.scores import SCORES_SCHEMA, load_scores, save_scores
from gemcut.records.statistics import (
    STATISTICS_FILE,
    STATISTICS_SCHEMA,
    LayerFile,
    StatisticsIndex,
    load_index_of,
    load_statistics,
    load_statistics_index,
    meta_to_json,
    save_statistics_index,
)

__all__ = [
    "BY_HAND",
    "IMPORTANCE_SCHEMA",
    "KLD_SCHEMA",
    "MANIFEST_SCHEMA",
    "PLAN_SCHEMA",
    "SCORES_SCHEMA",
    "STATISTICS_FILE",
    "STATISTICS_SCHEMA",
    "Gram",
    "LayerFile",
    "StatisticsIndex",
    "kld_from_json",
    "kld_to_json",
    "load_gram",
    "load_importance",
    "load_kld",
    "load_manifest",
    "load_plan",
    "load_scores",
    "load_statistics",
    "load_index_of",
    "load_statistics_index",
    "meta_to_json",
    "plan_text",
    "save_importance",
    "save_kld",
    "save_manifest",
    "save_plan",
    "save_scores",
    "save_statistics_index",
]
