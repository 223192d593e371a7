"""safetensors folders in and out: open, resolve, edit, write, diff, verify. No torch."""

from __future__ import annotations

from gemcut.checkpoint.read import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
