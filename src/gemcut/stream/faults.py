"""Say where a number stopped being one."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import nn

from gemcut.errors import CheckpointError, QualityError

_HINT = "look at this tensor with `gemcut inspect`; compare its hash with the publisher's"


def refuse(module: nn.Module, layer: int, what: str, where: str, prefix: str = "", unit: int | None = None) -> NoReturn:
    """Raise for a non-finite value: CheckpointError where a weight of the module is to blame, else QualityError.

    Args:
        prefix: only weights whose name begins so are looked at first (then all of the layer's).
        unit: the expert, where `prefix` holds fused experts: only its slice is looked at.
    """
    for begins in dict.fromkeys((prefix, "")):
        for name, value in module.state_dict().items():
            if not name.startswith(begins):
                continue
            part = value[unit] if begins and unit is not None and value.ndim == 3 else value
            if not bool(torch.isfinite(part).all()):
                bad = int((~torch.isfinite(part)).sum())
                raise CheckpointError(
                    f"{what} is not finite: layer {layer}'s {name} holds NaN or infinity",
                    where=where,
                    got=f"{bad} non-finite of {part.numel()} values",
                    hint=_HINT,
                )
    raise QualityError(
        f"{what} is not finite",
        where=where,
        got="NaN, infinity or a square beyond float32, with finite weights",
        wanted="a finite number",
        hint="compute in float32 (dtype: float32), or leave this item out of the corpus",
    )
