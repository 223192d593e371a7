"""Changes to a checkpoint. `cut` and `edits` need no torch; `heal` does, and is imported by its own name."""

from __future__ import annotations

from gemcut.surgery.cut import cut, verify_cut
from gemcut.surgery.edits import check_plan, config_for, cut_for_gguf, edits_for
from gemcut.surgery.gguf import plan_gguf_cut, verify_gguf_cut, write_gguf_cut

__all__ = [
    "check_plan",
    "config_for",
    "cut",
    "cut_for_gguf",
    "edits_for",
    "plan_gguf_cut",
    "verify_cut",
    "verify_gguf_cut",
    "write_gguf_cut",
]
