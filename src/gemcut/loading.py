"""`gemcut.load`: a checkpoint folder as transformers' own model, ready to run."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from gemcut import models
from gemcut.stream.devices import check_device
from gemcut.stream.model import stored_dtype
from gemcut.stream.weights import named_dtype
from gemcut.stream.whole import load_whole


def load(
    model: str | Path, *, dtype: str | None = None, device: str = "cpu", attention: str | None = None
) -> PreTrainedModel:
    """A checkpoint in memory as transformers' own model, for inference: plain weights, NVFP4A16 or NVFP4 (W4A4).

    Dense models and mixtures of experts, bare or inside the multimodal wrapper.

        model = gemcut.load("my-model-nvfp4")
        model.generate(**tokenizer("The sky is", return_tensors="pt"), max_new_tokens=20)

    A mixture of experts must come through here: `from_pretrained` alone leaves experts that are stored apart random,
    without an error. NVFP4 needs compressed-tensors: pip install 'gemcut[nvfp4]'. Weights are unpacked in memory, so
    that a quantised model takes as much of it as a plain one; W4A4 rounds activations at every call.

    Args:
        model: a folder, a shipped model (`demo:moe`), or a hub id.
        dtype: "bfloat16", "float16" or "float32"; None: as the plain weights are stored.
        device: "cpu", "cuda", "cuda:1", "mps".
        attention: transformers' attn_implementation; None: the one that is known to be right for the family.
    Raises:
        UsageError: there is no such model or dtype; weights laid out for modelopt, or quantised by other means.
        MissingError: there is no such device; compressed-tensors is absent; a package's release that is not known to
            load this.
        CheckpointError: damaged files, or some tensor would be left random or unused.
    """
    checkpoint = models.open_model(str(model))
    compute = stored_dtype(checkpoint) if dtype is None else named_dtype(dtype)
    return load_whole(checkpoint, dtype=compute, device=check_device(device), attention=attention)
