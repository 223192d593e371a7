"""What can be chosen about an observation, and which of it enters its fingerprint."""

from __future__ import annotations

from dataclasses import dataclass

from gemcut.errors import UsageError
from gemcut.types import Json

# Raised by hand whenever the numbers that a pass writes change: an older folder is then not taken for a finished one.
OBSERVE_VERSION = 3
SPLITS = 2  # halves of the corpus, by the parity of the question's index
GRAM_FLOOR = 16384  # tokens in a Gram matrix, where 4 × its width is less
GRAM_RANK = 4  # tokens per column: fewer leave the matrix rank-deficient or noisy
GRAM_SPLIT_BYTES = 512 << 20  # the two halves of a Gram matrix are kept apart where they fit into this


@dataclass(frozen=True, slots=True)
class ObserveSettings:
    """One streamed pass.

    device: "cpu", "cuda", "cuda:1".
    dtype: compute dtype, None for the one that the checkpoint is stored in.
    max_memory: refuse to begin when the pass needs more than this many bytes.
    batch_tokens: tokens (padding included) of one forward call; an item longer than this runs alone.
    gram_tokens: tokens in each layer's Gram matrix; None: max(4 × its width, 16384), or all when there are fewer.
    near_sample: tokens whose top-2k router logits are kept.
    seed: which tokens those are.
    """

    device: str = "cpu"
    dtype: str | None = None
    max_memory: int | None = None
    batch_tokens: int = 4096
    gram_tokens: int | None = None
    near_sample: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_tokens", 1), ("near_sample", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is too small", got=getattr(self, name), wanted=f"at least {least}")
        if self.gram_tokens is not None and self.gram_tokens < 1:
            raise UsageError("gram_tokens is too small", got=self.gram_tokens, wanted="at least 1, or none")

    def identity(self, stored: str) -> dict[str, Json]:
        """What decides the numbers. Batch size, memory and device change them by rounding only and stay out.

        Args:
            stored: the checkpoint's own dtype: asking for it by name asks for nothing else.
        """
        return {
            "version": OBSERVE_VERSION,
            "dtype": self.dtype or stored,
            "gram_tokens": self.gram_tokens,
            "near_sample": self.near_sample,
            "seed": self.seed,
        }

    def gram_take(self, width: int, tokens: int) -> int:
        """How many of `tokens` go into a Gram matrix of this width."""
        return min(tokens, self.gram_tokens or max(GRAM_RANK * width, GRAM_FLOOR))


def gram_splits(width: int) -> int:
    """2 where both halves of a float64 Gram matrix of this width fit into GRAM_SPLIT_BYTES, else 1."""
    return SPLITS if SPLITS * width * width * 8 <= GRAM_SPLIT_BYTES else 1
