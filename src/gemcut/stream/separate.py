"""Experts as modules of their own, in place of transformers' fused ones: the form that NVFP4 checkpoints store.

A stock model has one tensor for all experts of a layer, so that a folder with a linear for each of them loads without
an error and leaves every expert random. transformers lets a class be replaced while a model is built; names then line
up, and compressed-tensors quantises each linear as it does any other.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
import threading
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from gemcut.families.base import ExpertModule

_lock = threading.Lock()  # transformers' mapping is one for all threads


class _Expert(nn.Module):
    """One expert: three linears, as they are called on disk."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)


class SeparateExperts(nn.ModuleList):
    """All experts of a layer, called as the fused module is."""

    facts: ClassVar[ExpertModule]

    def __init__(self, config: Any) -> None:
        facts = self.facts
        hidden, inner = int(getattr(config, facts.hidden)), int(getattr(config, facts.inner))
        super().__init__(_Expert(hidden, inner) for _ in range(int(getattr(config, facts.experts))))
        self.activation = ACT2FN[getattr(config, facts.activation)]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """out[t] = Σ_e g[t, e]·down_e(act(gate_e(x_t))·up_e(x_t)), summed in the dtype of x.

        Args:
            hidden_states: x [T, H].   top_k_index, top_k_weights: [T, k]; an index beyond the last expert is padding.
        Returns:
            [T, H]. Experts ascend, and within one the tokens that rank it first come first: `eager`'s order of sums.
        """
        out = torch.zeros_like(hidden_states)
        by_rank = top_k_index.t()  # [k, T]
        for e in by_rank.unique().tolist():
            if e >= len(self):
                continue
            rank, token = torch.where(by_rank == e)
            x, expert = hidden_states[token], self[e]
            y = expert.down_proj(self.activation(expert.gate_proj(x)) * expert.up_proj(x))
            out.index_add_(0, token, (y * top_k_weights[token, rank, None]).to(out.dtype))
        return out


@contextlib.contextmanager
def separate_experts(facts: ExpertModule, layers: Collection[int]) -> Iterator[None]:
    """Models built inside have separate experts in these layers, and the stock module in all others.

    The class alone does not know its layer: experts are counted as they are built, which is in the order of layers. A
    wrong count would show as missing keys. transformers forgets to put the stock class back where building fails, so
    that is done here.
    """
    home = importlib.import_module(facts.module)
    stock: type[nn.Module] = getattr(home, facts.name)
    built = itertools.count()

    def new(cls: type[nn.Module], config: Any) -> nn.Module:
        return nn.Module.__new__(cls) if next(built) in layers else stock(config)

    patched = type("SeparateExperts", (SeparateExperts,), {"facts": facts, "__new__": new})
    with _lock:
        register_patch_mapping({facts.name: patched})
        try:
            yield
        finally:
            unregister_patch_mapping([facts.name])
            for module in list(sys.modules.values()):
                if getattr(module, "__dict__", {}).get(facts.name) is patched:
                    setattr(module, facts.name, stock)
