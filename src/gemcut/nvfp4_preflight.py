"""What the NVFP4 stages of a recipe would read, write and need; the size of the folder is known but for its headers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemcut import stages
from gemcut.checkpoint import Checkpoint
from gemcut.machine import Rates
from gemcut.nvfp4_stages import packed_bytes
from gemcut.preflight import LIGHT_MEMORY_BYTES, SMALL_WRITE_BYTES, StageCost, canary_cost, kld_cost, observe_cost
from gemcut.recipe import Recipe

if TYPE_CHECKING:
    from gemcut.stream.corpus import Corpus


def nvfp4_costs(recipe: Recipe, base: Checkpoint, model: Checkpoint, corpus: Corpus, rates: Rates) -> list[StageCost]:
    """Costs of the stages behind a cut, or of a model as it is; verifying is a part of writing.

    Args:
        model: what is quantised; the base, or the base as a cut of that many units would leave it.
    Raises:
        UsageError: patterns that match nothing, or nothing that can be quantised.
    """
    words = recipe.nvfp4
    assert words is not None
    packed, largest = packed_bytes(model, words)
    read, memory, seconds = 2 * model.size_bytes + packed, 2 * LIGHT_MEMORY_BYTES + largest // 16, None
    observed_by_files = recipe.gguf is not None and recipe.gguf.imatrix is not None
    if model is not base and words.observes and not observed_by_files:  # the cut model once more
        again = observe_cost(base, corpus, recipe.observe, rates)
        read, memory, seconds = read + again.read_bytes, max(memory, again.memory_bytes), again.seconds
    costs = [StageCost("nvfp4", "", read, packed + SMALL_WRITE_BYTES, memory, seconds)]
    if recipe.canary is not None:
        costs.append(canary_cost(base))
    if recipe.kld is not None:
        text = stages.corpus_of(recipe.kld, base)
        costs.append(kld_cost(base, text, 1, packed, recipe.kld.dtype, rates))
    return costs
