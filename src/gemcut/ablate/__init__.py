"""What the loss says: about heads (leave one out, or take the gradient), and about weights (squared gradients); one
decoder layer in memory."""

from gemcut.ablate.curvature import curvature, curvature_bytes
from gemcut.ablate.loo import LooSize, loo, loo_bytes
from gemcut.ablate.settings import AblateSettings
from gemcut.ablate.taylor import taylor, taylor_bytes

__all__ = ["AblateSettings", "LooSize", "curvature", "curvature_bytes", "loo", "loo_bytes", "taylor", "taylor_bytes"]
