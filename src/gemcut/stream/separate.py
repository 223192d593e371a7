"""Experts as modules of their own, in place of transformers' fused ones: the form that NVFP4 checkpoints store.

A stock model has one tensor for all experts of a layer, so that a folder with linears for each of them loads without an
error and leaves every expert random. Where the class is replaced while the model is built, names line up, and
compressed-tensors quantises these linears as it does any others.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from gemcut.families.base import ExpertModule

_lock = threading.Lock()  # the class is replaced for all threads


class _Expert(nn.Module):
    """One expert: three linears, as they are called on disk."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)


class SeparateExperts(nn.ModuleList):
    """All experts of a layer, called as the fused module is."""

    def __init__(self, facts: ExpertModule, config: Any) -> None:
        hidden, inner = int(getattr(config, facts.hidden)), int(getattr(config, facts.inner))
        super().__init__(_Expert(hidden, inner) for _ in range(int(getattr(config, facts.experts))))
        self.__dict__["activation"] = ACT2FN[getattr(config, facts.activation)]  # a module, but none of the list

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
        act: Callable[[torch.Tensor], torch.Tensor] = self.__dict__["activation"]
        for e in by_rank.unique().tolist():
            if e >= len(self):
                continue
            rank, token = torch.where(by_rank == e)
            x, expert = hidden_states[token], self[e]
            y = expert.down_proj(act(expert.gate_proj(x)) * expert.up_proj(x))
            out.index_add_(0, token, (y * top_k_weights[token, rank, None]).to(out.dtype))
        return out


@contextlib.contextmanager
def separate_experts(facts: ExpertModule, layers: Collection[int]) -> Iterator[None]:
    """Models built inside have separate experts in these layers, and the stock module in all others.

    Neither class is told its layer: experts are counted as they are built, which is in the order of layers, and a wrong
    count would show as missing keys. transformers' own mapping of patched classes is not used: it imports modules that
    need packages nobody has, just to look at their names, and leaves classes patched where building fails.
    """
    home = importlib.import_module(facts.module)
    stock: type[nn.Module] = getattr(home, facts.name)
    built = itertools.count()

    class AsStock(type):
        """transformers asks of each module whether it is stock experts, whose tensors it then fills."""

        def __instancecheck__(cls, module: object) -> bool:
            return isinstance(module, stock)

    class Either(metaclass=AsStock):
        """What is called as the stock class while a model is built."""

        def __new__(cls, config: Any) -> Any:
            return SeparateExperts(facts, config) if next(built) in layers else stock(config)

    with _lock:
        setattr(home, facts.name, Either)
        try:
            yield
        finally:
            setattr(home, facts.name, stock)
