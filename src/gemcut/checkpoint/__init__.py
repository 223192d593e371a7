"""safetensors folders in and out: open, resolve, inspect, edit, write, diff, verify. No torch."""

from __future__ import annotations

from gemcut.checkpoint.diff import diff
from gemcut.checkpoint.hub import ResolvedModel, resolve
from gemcut.checkpoint.inspect import Inspection, inspect
from gemcut.checkpoint.read import Checkpoint, open_checkpoint
from gemcut.checkpoint.verify import VerifyReport, verify
from gemcut.checkpoint.write import WriteReport, write_checkpoint

__all__ = [
    "Checkpoint",
    "Inspection",
    "ResolvedModel",
    "VerifyReport",
    "WriteReport",
    "diff",
    "inspect",
    "open_checkpoint",
    "resolve",
    "verify",
    "write_checkpoint",
]
