"""safetensors folders in and out: open, resolve, edit, write, diff, verify. No torch."""

from __future__ import annotations

from gemcut.checkpoint.diff import diff
from gemcut.checkpoint.hub import ResolvedModel, resolve
from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.checkpoint.verify import VerifyReport, verify
from gemcut.checkpoint.write import WriteReport, write_checkpoint

__all__ = [
    "Checkpoint",
    "ResolvedModel",
    "VerifyReport",
    "WriteReport",
    "diff",
    "open_checkpoint",
    "resolve",
    "verify",
    "write_checkpoint",
]
