"""What can be chosen about a measurement of heads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemcut.stream.hidden import BATCH_TOKENS


@dataclass(frozen=True, slots=True)
class AblateSettings:
    """One measurement, of either method.

    layers: whose heads; None: all.
    device: "cpu", "cuda", "cuda:1".
    dtype: of the layers; None: as the checkpoint is stored. 16-bit states move by more than many heads do.
    batch_tokens: padded positions that go through a layer together.
    max_bytes: of hidden states on disk; None: half of what is free.
    memory_bytes: of hidden states in memory before any goes to disk; None: a quarter of what is free.
    scratch: where the nameless files lie; None: the system's temporary folder.
    """

    layers: tuple[int, ...] | None = None
    device: str = "cpu"
    dtype: str | None = None
    batch_tokens: int = BATCH_TOKENS
    max_bytes: int | None = None
    memory_bytes: int | None = None
    scratch: Path | None = None


DEFAULTS = AblateSettings()
