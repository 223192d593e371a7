"""What can be chosen about a canary, and which of it the answers depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from gemcut.errors import UsageError
from gemcut.types import Json

# Raised by hand whenever the same model would answer otherwise: cached answers are then not taken for current ones.
CANARY_VERSION = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """When an answer is broken, and how many broken ones are too many. All inclusive: a value at its limit passes.

    loop_repeats, loop_tokens: an answer loops when its tail repeats one period at least so often over at least so many
        tokens. Three, because two happen in lists and tables.
    distinct4: least share of distinct 4-grams of tokens; a phrase that makes up half of the answer twice over is below.
    zlib_ratio: most bytes of text per compressed byte, from `zlib_bytes` of text on. English prose of this length
        is at 1.5, a table of numbers at 2.5.
    foreign_share, foreign_letters: most letters in scripts that neither prompt nor base answer use; both exceeded.
    newly_broken: most prompts of a condition, as a share, that are broken in the candidate and not in the base, less
        those that it mends: a small model that loops now and then by itself does so at other prompts after any change.
    nll_ratio: most mean NLL of known-good answers under the candidate by that under the base, by condition.
    base_broken: where more of the base's own answers are broken, shares say nothing and only the ratio decides.
    """

    loop_repeats: int = 3
    loop_tokens: int = 12
    distinct4: float = 0.5
    zlib_ratio: float = 3.5
    zlib_bytes: int = 64
    foreign_share: float = 0.05
    foreign_letters: int = 2
    newly_broken: float = 0.25
    nll_ratio: float = 2.0
    base_broken: float = 0.5

    def __post_init__(self) -> None:
        if self.loop_repeats < 2 or self.loop_tokens < 2:
            raise UsageError("a loop needs two repeats and two tokens", got=(self.loop_repeats, self.loop_tokens))
        for name in ("distinct4", "foreign_share", "newly_broken", "base_broken"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is a share", got=getattr(self, name), wanted="0 to 1")
        if not self.nll_ratio >= 1 or not self.zlib_ratio >= 1:
            raise UsageError("nll_ratio and zlib_ratio are at least 1", got=(self.nll_ratio, self.zlib_ratio))


@dataclass(frozen=True, slots=True)
class CanarySettings:
    """One canary.

    max_new_tokens: where an answer is cut off.
    dtype: compute dtype; None: float32 for weights up to 1 GiB as stored, else the stored dtype. A fixed rule, not the
        machine's memory: the same model gives the same record everywhere.
    device: "cpu", "cuda", "cuda:1".
    max_memory: refuse beyond this many bytes; None: what the machine has free.
    """

    max_new_tokens: int = 48
    dtype: str | None = None
    device: str = "cpu"
    max_memory: int | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 4:
            raise UsageError("max_new_tokens is too small to see a loop", got=self.max_new_tokens, wanted="at least 4")

    def identity(self) -> dict[str, Json]:
        """What the answers depend on, besides model, prompts and stack: the limits only judge them."""
        return {
            "version": CANARY_VERSION,
            "max_new_tokens": self.max_new_tokens,
            "dtype": self.dtype or "auto",
            "device": self.device.partition(":")[0],
        }

    def record(self) -> dict[str, Json]:
        """All of it that a verdict depends on."""
        return {**self.identity(), "limits": asdict(self.limits)}
