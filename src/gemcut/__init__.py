"""Cut a large model down to the machine you have, and prove what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gemcut.loading import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> object:
    """`gemcut.load` brings torch and transformers, so it is looked for when it is used, and not before."""
    if name == "load":
        from gemcut.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
