"""Experts apart, held against transformers' fused module, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma4TextConfig
from transformers.models.gemma4 import modeling_gemma4

from gemcut.families.gemma4 import FAMILY
from gemcut.stream.separate import SeparateExperts, separate_experts
from tiny import text_config

FACTS = FAMILY.experts
CONFIG = Gemma4TextConfig(**text_config("moe"))
CONFIG._experts_implementation = "eager"


def pair(dtype: torch.dtype) -> tuple[nn.Module, SeparateExperts]:
    assert FACTS is not None
    torch.manual_seed(0)
    fused = modeling_gemma4.Gemma4TextExperts(CONFIG)
    for weight in fused.parameters():
        nn.init.normal_(weight, std=0.3)
    apart = SeparateExperts(FACTS, CONFIG)
    for e, expert in enumerate(apart):
        expert.gate_proj.weight.data, expert.up_proj.weight.data = fused.gate_up_proj.data[e].chunk(2)
        expert.down_proj.weight.data = fused.down_proj.data[e]
    return fused.to(dtype), apart.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_as_fused(dtype: torch.dtype) -> None:
    fused, apart = pair(dtype)
    x = torch.randn(40, 64).to(dtype)
    index = torch.stack([torch.randperm(7)[:2] for _ in range(40)])  # the last expert sees nothing
    weights = torch.rand(40, 2)
    with torch.no_grad():
        assert torch.equal(apart(x, index, weights), fused(x, index, weights))
        index[3], index[5, 1] = 8, 8  # beyond the last expert: padding
        found = apart(x, index, weights)
        assert torch.equal(found, fused(x, index, weights))
    assert not found[3].any()


def test_layers_are_counted_and_the_class_comes_back() -> None:
    assert FACTS is not None
    stock = modeling_gemma4.Gemma4TextExperts
    with separate_experts(FACTS, {1, 4}):
        model = modeling_gemma4.Gemma4ForCausalLM(CONFIG)
    kinds = [type(layer.experts) for layer in model.model.layers]
    assert kinds == [SeparateExperts if i in (1, 4) else stock for i in range(6)]
    assert modeling_gemma4.Gemma4TextExperts is stock
    with pytest.raises(ValueError, match="inside"), separate_experts(FACTS, {1}):
        raise ValueError("inside")
    assert modeling_gemma4.Gemma4TextExperts is stock
