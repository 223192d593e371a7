"""The recording experts implementation: eager's bits, routed tokens only, and what the recorder is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny import text_config
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from gemcut.errors import UsageError
from gemcut.stream.experts import RECORDING, attach, register, rounded


class Recorder:
    def __init__(self) -> None:
        self.told: list[Any] = []
        self.calls: list[tuple[int, slice, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.combined: torch.Tensor | None = None
        self.fed = self.between = torch.empty(0)

    def begin(self, inputs: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, gate: torch.Tensor) -> None:
        self.told = [inputs, token, expert, gate]

    def inputs(self, expert: int, rows: slice, x: torch.Tensor) -> None:
        self.fed = x

    def inner(self, expert: int, rows: slice, h: torch.Tensor) -> None:
        self.between = h

    def outputs(self, expert: int, rows: slice, f: torch.Tensor) -> None:
        self.calls.append((expert, rows, self.fed, self.between, f.clone()))

    def end(self, combined: torch.Tensor) -> None:
        self.combined = combined


def make(dtype: torch.dtype, implementation: str) -> Gemma4TextExperts:
    register()
    config = Gemma4TextConfig(**text_config("moe-text"))
    config._experts_implementation = implementation
    experts = Gemma4TextExperts(config).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for weight in experts.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return experts.to(dtype)


def routing(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=generator).to(dtype)
    index = torch.rand(tokens, 8, generator=generator).topk(2).indices
    return x, index, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 2, 61, 700])
def test_the_bits_of_eager(dtype: torch.dtype, tokens: int) -> None:
    x, index, gate = routing(tokens, dtype)
    ours, eager = make(dtype, RECORDING), make(dtype, "eager")
    assert torch.equal(ours(x, index, gate), eager(x, index, gate))
    attach(ours, Recorder())
    assert torch.equal(ours(x, index, gate), eager(x, index, gate))


def test_the_recorder_sees_each_routed_pair_once() -> None:
    x, index, gate = routing(61, torch.float32)
    experts, recorder = make(torch.float32, RECORDING), Recorder()
    attach(experts, recorder)
    out = experts(x, index, gate)
    _, token, expert, weight = recorder.told
    assert len(token) == 61 * 2  # routed tokens only: 2 of 8 experts each
    assert (expert.diff() >= 0).all()
    for t, e, w in zip(token.tolist(), expert.tolist(), weight.tolist(), strict=True):
        assert w == gate[t][index[t] == e].item()
    total = torch.zeros_like(x)
    for e, rows, inputs, inner, output in recorder.calls:
        assert torch.equal(inputs, x[token[rows]])
        assert (expert[rows] == e).all()
        assert torch.equal(inner @ experts.down_proj[e].t(), output)
        total.index_add_(0, token[rows], output * weight[rows, None])
    assert torch.equal(total, out)
    assert recorder.combined is out


def test_padding_runs_through_no_expert() -> None:
    x, index, gate = routing(10, torch.float32)
    experts, recorder = make(torch.float32, RECORDING), Recorder()
    whole = experts(x, index, gate)
    live = torch.arange(10) < 6
    attach(experts, recorder, live)
    out = experts(x, index, gate)
    assert recorder.told[1].max() == 5
    assert not out[6:].any()
    torch.testing.assert_close(out[:6], whole[:6])


def test_row_counts_come_from_a_short_list() -> None:
    sizes = {rounded(n) for n in range(1, 4097)}
    assert len(sizes) < 64
    assert all(n <= rounded(n) <= max(n + 15, n * 9 / 8 + 1) for n in range(1, 9000))


def test_other_forms_of_experts_are_refused() -> None:
    x, index, gate = routing(3, torch.float32)
    experts = make(torch.float32, RECORDING)
    experts.is_transposed = True
    with pytest.raises(UsageError, match="does not record"):
        experts(x, index, gate)
