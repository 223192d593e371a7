"""How much memory and disk a heal takes, from headers and settings alone."""

from __future__ import annotations

from gemcut.checkpoint.read import Checkpoint
from gemcut.surgery.heal.down import token_bytes
from gemcut.surgery.heal.settings import HealSettings, jobs_of
from gemcut.surgery.heal.solve import CHUNK_ROWS
from gemcut.surgery.heal.unseen import row_bytes
from gemcut.types import DTYPE_BYTES, Plan

_BASE_BYTES = 640 << 20  # interpreter, torch, transformers and their first matrix product, measured on Linux
_UNEVEN = 1.5  # items of different lengths: those that are measured on may be the longer ones
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def heal_memory_bytes(base: Checkpoint, plan: Plan, settings: HealSettings, *, longest: int = 0) -> int:
    """Upper estimate of the process's resident memory at its peak, in bytes.

    max(one decoder layer + its moments + one batch, one decoder layer + moments + the solve, embedding) + base

    The moments of a layer with K kept columns are K² + H·K float64 values; the solve needs the matrix once more. What
    is measured on lies on disk.

    Args:
        longest: tokens of the corpus' longest item, where it is longer than a batch.
    """
    item = _item_bytes(base, settings)
    hidden, inner = _number(base, "hidden_size"), _number(base, "intermediate_size")
    length = longest or settings.batch_tokens
    tokens = max(settings.batch_tokens, longest)
    names = base.tensors.keys()
    running = solving = 0
    for layer, job in jobs_of(base, plan, heal_all=settings.heal_all, experts=settings.experts).items():
        prefix = base.family.layer_prefix(names, layer)
        weights = sum(ref.elements for name, ref in base.tensors.items() if name.startswith(prefix)) * item
        kept, width = len(job.columns), job.units * job.head_dim
        moments = 8 * (kept * kept + hidden * kept)
        batch = tokens * (hidden * (7 * item + 16) + width * (7 * item + 4) + inner * 4 * item) + 6 * length * length
        batch += 8 * (tokens * 3 * hidden + CHUNK_ROWS * 2 * (hidden + kept))
        if job.kind != "heads":  # what every routed expert adds: as it runs, kept, gathered, and checked
            batch += tokens * hidden * max(base.family.top_k(base.text_config), 1) * 4 * 4
        solve = 8 * (kept * kept + 4 * hidden * kept + hidden * width + CHUNK_ROWS * 4 * (hidden + kept))
        if job.kind == "down_proj":  # stored, as it becomes, and while it is tried; its rows are mapped files
            solve += 4 * base.ref(job.tensor).size_bytes
        running = max(running, weights + moments + batch)
        solving = max(solving, weights + moments + solve)
    ends = sum(r.elements for n, r in base.tensors.items() if n.endswith(("embed_tokens.weight", "lm_head.weight")))
    return _BASE_BYTES + max(running, solving, ends * item)


def heal_disk_bytes(base: Checkpoint, plan: Plan, settings: HealSettings, *, tokens: int) -> int:
    """Upper estimate of what a heal has on disk at once: hidden states of two streams at two boundaries, under 13 % of
    padding, the rows of the widest layer that are measured on, and the healed tensors."""
    jobs = jobs_of(base, plan, heal_all=settings.heal_all, experts=settings.experts)
    states = tokens * _number(base, "hidden_size") * _item_bytes(base, settings)
    streams = 2 if settings.method == "sequential" else 1
    healed = sum(base.ref(job.tensor).size_bytes for job in jobs.values())
    measured = tokens * (2 if len(settings.ridges) > 1 else 1) / settings.every
    row = row_bytes(jobs.values(), _number(base, "hidden_size"), _item_bytes(base, settings))
    row_of_all = token_bytes(base, jobs.values(), _item_bytes(base, settings))
    return int(2 * streams * 1.13 * states + _UNEVEN * measured * row + tokens * row_of_all) + healed


def _number(base: Checkpoint, key: str) -> int:
    value = base.text_config.get(key)
    return value if isinstance(value, int) else 0


def _item_bytes(base: Checkpoint, settings: HealSettings) -> int:
    if settings.dtype is not None:
        return _BYTES.get(settings.dtype, 4)
    stored = (r.dtype for name, r in base.tensors.items() if name.endswith("embed_tokens.weight"))
    return DTYPE_BYTES.get(next(stored, "F32"), 4)
