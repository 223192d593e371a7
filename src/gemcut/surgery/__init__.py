"""Changes to a checkpoint. `cut` needs no torch; `heal` does, and is imported by its own name."""

from __future__ import annotations

from gemcut.surgery.cut import check_plan, config_for, cut, edits_for, verify_cut

__all__ = ["check_plan", "config_for", "cut", "edits_for", "verify_cut"]
