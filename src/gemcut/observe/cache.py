"""The largest key and value of every KV head, as they would enter a key-value cache: normed, keys rotated."""

from __future__ import annotations

from typing import Any

import torch


class CachePeaks:
    """Stands where transformers' Cache stands in an attention's call: sees keys and values, and gives them back.

    For keys k and values v [B, H, S, D]:   k_amax[h] = max |k|   v_amax[h] = max |v|   float32, over real tokens.
    """

    def __init__(self) -> None:
        self._peaks: tuple[torch.Tensor, torch.Tensor] | None = None
        self._live: torch.Tensor | None = None

    def start(self, live: torch.Tensor | None) -> None:
        """The next call's real positions, bool [B · S]; None when all are."""
        self._live = live

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What an attention calls before it attends."""
        found = (self._peak(keys), self._peak(values))
        if self._peaks is None:
            self._peaks = found
        else:
            self._peaks = (torch.maximum(self._peaks[0], found[0]), torch.maximum(self._peaks[1], found[1]))
        return keys, values

    def _peak(self, states: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D] → [H]"""
        size = states.abs().amax(-1).transpose(0, 1).flatten(1)  # [H, B · S]
        return (size if self._live is None else size[:, self._live]).amax(-1).float()

    def tensors(self) -> dict[str, torch.Tensor]:
        """`cache.{k,v}.amax`; nothing where no attention ran."""
        if self._peaks is None:
            return {}
        return {f"cache.{name}.amax": peak.cpu() for name, peak in zip("kv", self._peaks, strict=True)}
