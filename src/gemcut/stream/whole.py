"""A checkpoint whole in memory as transformers' own model: plain folders, and NVFP4 through compressed-tensors.

The model is stock but for two things. Experts that are stored apart stay apart (`separate`). And packed weights are
unpacked when they are loaded, not at the first call: transformers' hook gives BF16 whatever dtype was asked for, and
leaves modules that cannot be moved any more. W4A4 rounds activations at every call, as compressed-tensors does it.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gemcut.checkpoint.read import Checkpoint
from gemcut.errors import CheckpointError, MissingError, UsageError
from gemcut.nvfp4.layout import QUANTIZATION, is_nvfp4, read_config
from gemcut.stream.separate import separate_experts

# package → the first release that loads these checkpoints, and the first that is not known to; pyproject.toml agrees
RELEASES = {"transformers": ((5, 20), (5, 23)), "compressed-tensors": ((0, 20), (0, 21))}
_EXTRA = "nvfp4"
_BARS = ("compressed_tensors.compressors.model_compressors.model_compressor",
         "compressed_tensors.quantization.lifecycle.apply")  # fmt: skip
_EXPERT = re.compile(r"\.layers\.(\d{1,6})\.experts\.\d+\.")


def load_whole(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    attention: str | None = None,
    experts: str | None = None,
) -> PreTrainedModel:
    """The checkpoint's model, for inference: eval mode, no gradients, every tensor of the folder in its place.

    Args:
        dtype: of weights and activations; NVFP4 weights are e2m1·(s/G) in float32, rounded to it once.
        attention: transformers' attn_implementation; None: what the family says.
        experts: transformers' experts_implementation, for experts that are stored fused; None: its default.
    Raises:
        MissingError: compressed-tensors is not installed, or a package's release is not one that is known to load this.
        UsageError: weights quantised in a way that does not load.
        CheckpointError: transformers cannot load it, or some tensor would be left random or unused.
    """
    _check_release("transformers", checkpoint)
    quantised = is_quantised(checkpoint)
    if quantised:
        _check_release("compressed-tensors", checkpoint)
    options: dict[str, Any] = {} if experts is None else {"experts_implementation": experts}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet(quantised))
        apart = {int(found[1]) for name in checkpoint.tensors if (found := _EXPERT.search(name))}
        if apart and checkpoint.family.experts is not None:
            stack.enter_context(separate_experts(checkpoint.family.experts, apart))
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                dtype=dtype,
                attn_implementation=attention or checkpoint.family.serving.attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, ImportError) as error:
            raise CheckpointError(
                "transformers cannot load this checkpoint",
                where=checkpoint.name,
                got=f"{type(error).__name__}: {error}".split("\n")[0][:200],
            ) from error
    _check_keys(info, checkpoint.name)
    if quantised:
        _unpack(model, dtype)
    loaded: PreTrainedModel = model.eval().requires_grad_(False).to(device)
    return loaded


def is_quantised(checkpoint: Checkpoint) -> bool:
    """Whether the weights are NVFP4 that loads; False for plain ones.

    Raises:
        UsageError: they are quantised otherwise, or laid out for modelopt.
        CheckpointError: config.json contradicts itself.
    """
    said = checkpoint.config.get(QUANTIZATION)
    if said is None:
        return False
    if not is_nvfp4(checkpoint.config):
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise UsageError(
            "this checkpoint is quantised in a way that does not load here",
            where=f"{checkpoint.name}, config.json: {QUANTIZATION}",
            got=str(method)[:60],
            wanted="plain weights, or NVFP4 as compressed-tensors lays it out",
        )
    if read_config(checkpoint.config, checkpoint.name).layout == "modelopt":
        raise UsageError(
            "no loader of transformers reads the modelopt layout",
            where=checkpoint.name,
            wanted="the compressed-tensors layout",
            hint="gemcut nvfp4 FOLDER --convert --layout compressed-tensors -o OUT changes names, not numbers",
        )
    return True


def _check_release(package: str, checkpoint: Checkpoint) -> None:
    first, stop = RELEASES[package]
    wanted = f">={'.'.join(map(str, first))},<{'.'.join(map(str, stop))}"
    install = f"pip install '{package}{wanted}'" if package == "transformers" else f"pip install 'gemcut[{_EXTRA}]'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise MissingError(
            f"{package} is not installed, and these weights load through it", where=checkpoint.name, hint=install
        ) from None
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if not first <= numbers < stop:
        raise MissingError(
            f"this release of {package} is not one that is known to load these weights",
            where=checkpoint.name, got=found, wanted=wanted, hint=install,
        )  # fmt: skip


def _check_keys(info: dict[str, Any], name: str) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            names = sorted(str(key) for key in info[kind])
            raise CheckpointError(
                f"the checkpoint does not load cleanly: {kind.replace('_', ' ')}",
                where=name,
                got=f"{len(names)}: {', '.join(names[:3])}"[:300],
                wanted="every tensor in its place",
            )


def _unpack(model: Any, dtype: torch.dtype) -> None:
    """Weights in place of codes, as compressed-tensors unpacks them, from float32 to any dtype at once."""
    from compressed_tensors.compressors.base import decompress_module
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    for module in model.modules():
        packed: torch.Tensor | None = getattr(module, "weight_packed", None)
        if packed is None:
            continue
        decompress_module(module)  # BF16, and everything that the module's forward asks for
        if dtype != torch.bfloat16:
            rows, half = packed.shape
            weight = dequantize(
                x_q=unpack_fp4_from_uint8(packed, rows, 2 * half, dtype=torch.float32),
                scale=module.weight_scale.float(),
                args=module.quantization_scheme.weights,
                global_scale=module.weight_global_scale,
                dtype=dtype,
            )
            module.weight = nn.Parameter(weight, requires_grad=False)
    model.hf_quantizer.compressor.remove_decompression_hook(model)


@contextlib.contextmanager
def _quiet(quantised: bool) -> Iterator[None]:
    """Without progress bars, which only the console draws, and without warnings: what matters is raised."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    others = [importlib.import_module(name) for name in _BARS] if quantised else []
    before = [vars(module)["tqdm"] for module in others]
    for module in others:
        vars(module)["tqdm"] = _no_bar
    try:
        yield
    finally:
        for module, bar in zip(others, before, strict=True):
            vars(module)["tqdm"] = bar
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _no_bar(items: Any, **_: Any) -> Any:
    return items
