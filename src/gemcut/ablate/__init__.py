"""What the loss says about attention heads: leave one out, or take the gradient; one decoder layer in memory."""

from gemcut.ablate.loo import LooSize, loo, loo_bytes
from gemcut.ablate.settings import AblateSettings
from gemcut.ablate.taylor import taylor, taylor_bytes

__all__ = ["AblateSettings", "LooSize", "loo", "loo_bytes", "taylor", "taylor_bytes"]
