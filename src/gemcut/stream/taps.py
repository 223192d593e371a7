"""Stand-ins for the parts of a model that are not in memory: they keep what the model passes to its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Call:
    """What the model passed to one layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Tap(nn.Module):
    """Stands where a decoder layer stood: keeps what it is called with; passes on its input, or what it was given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: it must not show among the model's parameters
        self.__dict__["seen"] = None
        self.__dict__["call"] = None
        self.__dict__["give"] = None

    def __getattr__(self, name: str) -> Any:
        # some architectures ask a layer for its attention type before they call it
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.__dict__["seen"] = hidden_states
        self.__dict__["call"] = Call(args, kwargs)
        give: torch.Tensor | None = self.__dict__["give"]
        return hidden_states if give is None else give


class NoEmbedding(nn.Module):
    """Stands for the embedding while only call arguments are wanted."""

    def __init__(self, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.hidden, self.dtype, self.device = hidden, dtype, device

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((*input_ids.shape, self.hidden), dtype=self.dtype, device=self.device)


def call_bytes(calls: list[Call]) -> int:
    """Memory of the tensors in one shape's calls; layers of one attention type share theirs."""
    sizes: dict[int, int] = {}

    def count(value: object) -> None:
        if isinstance(value, torch.Tensor):
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for part in value:
                count(part)
        elif isinstance(value, dict):
            for part in value.values():
                count(part)

    for call in calls:
        count(call.args)
        count(call.kwargs)
    return sum(sizes.values())
