"""An experts implementation for transformers' own registry that hands every routed expert's output to a recorder.

Routed tokens only: each expert runs once, on its own tokens. The combined output has the same bits as `eager`, because
the same operations run on the same rows in the same order.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from gemcut.errors import UsageError

RECORDING = "gemcut_recording"
_STEPS = (16, 32, 64, 128, 256, 512)


class ExpertRecorder(Protocol):
    """What sees the experts of one layer during one forward call.

    T tokens of the call (padding left out), k experts per token, P = T·k routed pairs in expert order.
    """

    def begin(self, inputs: torch.Tensor, token: torch.Tensor, expert: torch.Tensor, gate: torch.Tensor) -> None:
        """inputs [T, H]; per pair, sorted by expert: token [P], expert [P], final top-k weight gate [P]."""

    # Three calls for each expert with routed tokens, each at the moment when the rows are fresh in the cache; `rows`
    # are the expert's pairs, and tensors are only valid during the call.

    def inputs(self, expert: int, rows: slice, x: torch.Tensor) -> None:
        """x [n, H] enters gate_up_proj."""

    def inner(self, expert: int, rows: slice, h: torch.Tensor) -> None:
        """h [n, I] enters down_proj."""

    def outputs(self, expert: int, rows: slice, f: torch.Tensor) -> None:
        """f [n, H], unweighted, float32 or wider."""

    def end(self, combined: torch.Tensor) -> None:
        """combined [T, H]: the experts' summed output, before any norm."""


class InputRounding(Protocol):
    """What a checkpoint with quantised activations does to the rows of one expert before each of its products."""

    def inputs(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """x [n, H] as gate_up_proj gets it."""

    def inner(self, expert: int, h: torch.Tensor) -> torch.Tensor:
        """h [n, I] as down_proj gets it."""


def attach(experts: nn.Module, recorder: ExpertRecorder | None, live: torch.Tensor | None = None) -> None:
    """Give a layer's experts module a recorder, and the mask [T] of its tokens that are not padding."""
    experts.__dict__["gemcut_recorder"] = recorder
    experts.__dict__["gemcut_live"] = live


def round_inputs(experts: nn.Module, rounding: InputRounding | None) -> None:
    """Have a layer's experts round what enters their products; None: no longer. Only RECORDING does."""
    experts.__dict__["gemcut_rounding"] = rounding


def recording_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Combined output [T, H] of the routed experts. Padding tokens run through no expert and come out as zeros.

    out[t] = Σ_e g[t, e]·f_e(x_t), summed in ascending expert order in the dtype of `hidden_states` (as `eager` does).
    """
    if self.has_bias or not self.has_gate or self.is_transposed or self.has_post_expert_norm:
        raise UsageError(
            "the experts of this architecture have a form that observe does not record",
            where=type(self).__name__,
            wanted="gated experts without bias, stored [E, 2I, H] and [E, H, I]",
        )
    recorder: ExpertRecorder | None = self.__dict__.get("gemcut_recorder")
    rounding: InputRounding | None = self.__dict__.get("gemcut_rounding")
    live: torch.Tensor | None = self.__dict__.get("gemcut_live")
    # apart once, not by index: a gradient then is put together once, and not as a whole tensor for every expert
    gate_up: tuple[torch.Tensor, ...] = self.gate_up_proj.unbind()  # E × [2I, H]
    down: tuple[torch.Tensor, ...] = self.down_proj.unbind()  # E × [H, I]
    combined = torch.zeros_like(hidden_states)
    # rank-major, as eager enumerates them: within an expert, first the tokens that rank it first, then second, …
    flat_expert = top_k_index.t().reshape(-1)  # [k·T]
    flat_token = torch.arange(len(hidden_states), device=hidden_states.device).repeat(top_k_index.shape[1])
    flat_gate = top_k_weights.t().reshape(-1)
    if live is not None:
        kept = live[flat_token]
        flat_expert, flat_token, flat_gate = flat_expert[kept], flat_token[kept], flat_gate[kept]
    expert, order = torch.sort(flat_expert, stable=True)
    token, gate = flat_token[order], flat_gate[order]
    wide = torch.promote_types(gate.dtype, hidden_states.dtype)
    counts = torch.bincount(expert, minlength=len(gate_up)).tolist()
    if recorder is not None:
        recorder.begin(hidden_states, token, expert, gate)
    narrow = hidden_states.device.type == "cpu" and hidden_states.dtype != torch.float32
    spare = torch.cat([token, token.new_zeros(_STEPS[-1])]) if narrow else token
    first = 0
    for e, n in enumerate(counts):
        if n == 0:
            continue
        rows = slice(first, first + n)
        first += n
        inputs = hidden_states[spare[rows.start : rows.start + (rounded(n) if narrow else n)]]
        if recorder is not None:
            recorder.inputs(e, rows, inputs[:n])
        if rounding is not None:
            inputs = rounding.inputs(e, inputs)
        inner = self._apply_gate(nn.functional.linear(inputs, gate_up[e]))
        if recorder is not None:
            recorder.inner(e, rows, inner[:n])
        if rounding is not None:
            inner = rounding.inner(e, inner)
        # eager's `output * gate` widens to the gate's float32 as well: done before, so that a recorder needs no copy
        output = nn.functional.linear(inner, down[e])[:n].to(wide)
        if recorder is not None:
            recorder.outputs(e, rows, output)
        output.mul_(gate[rows, None])
        combined.index_add_(0, token[rows], output.to(combined.dtype))
    if recorder is not None:
        recorder.end(combined)
    return combined


def rounded(rows: int) -> int:
    """A row count from a short list, at most an eighth above `rows` where there are 128 or more.

    oneDNN compiles a kernel for every new shape of a 16-bit product, at ten times the cost of the product itself, and
    keeps 1024 of them. The rows that are too many belong to the next experts; what they give is thrown away.
    """
    step = next((s for s in _STEPS if rows <= 16 * s), _STEPS[-1])
    return -(-rows // step) * step


def register() -> None:
    """Put the implementation into transformers' registry, under RECORDING. Again is harmless."""
    ALL_EXPERTS_FUNCTIONS.register(RECORDING, recording_experts_forward)
