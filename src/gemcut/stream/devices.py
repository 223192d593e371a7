"""Which devices torch sees here."""

from __future__ import annotations

import torch


def device_names() -> tuple[str, ...]:
    """Names that --device takes: "cpu" always, then every CUDA device, then Apple's."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return tuple(names)
