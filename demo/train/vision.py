"""Train the vision tower of the mixture: `python -m demo.train.vision --trunk demo/moe --out DIR --log FILE`.

The trunk is frozen; gradients only pass through it. First the tower alone learns to see, with heads that are thrown
away: colour and shape of the figure whose centre lies in a cell, and in every cell colour, shape and number of the
whole picture. Then tower and projection learn to make the trunk answer, by cross entropy on the answers' tokens.
Legend: B pictures, P patches of a picture, N cells (soft tokens) of it, T places of a row, K width of a patch.
"""

# torch and transformers leave these entry points without types
# mypy: disable-error-code="no-untyped-call,no-any-return"

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo.train.architecture import MOE, text_config
from demo.train.export import config as trunk_config
from demo.train.export import written
from demo.train.generators.pictures import CELL, COLOURS, HEIGHT, MOST, SHAPES, WIDTH, Picture, Question, asked, drawn
from demo.train.optimizer import Optimizer, schedule
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

PATCH, POOL = 4, 3
DOWN, ACROSS = HEIGHT // CELL, WIDTH // CELL
CELLS = DOWN * ACROSS
PREFIX = "model.vision_tower.", "model.embed_vision."
SEE_ROWS, TELL_ROWS = 16, 8


def vision_config() -> dict[str, object]:
    """The tower: as in the large models but narrow, and with patches of 4 pixels."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "model_type": "gemma4_vision",
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "num_key_value_heads": 3,
        "patch_size": PATCH,
        "pooling_kernel_size": POOL,
        "position_embedding_size": 128,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
        "standardize": True,
        "use_clipped_linears": False,
    }


def config() -> dict[str, object]:
    """config.json of trunk and tower together; picture tokens see each other, as in the large models."""
    text = text_config(MOE) | {"use_bidirectional_attention": "vision"}
    return trunk_config(MOE) | {
        "text_config": text,
        "vision_config": vision_config(),
        "vision_soft_tokens_per_image": CELLS,
    }


PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": False,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "Gemma4ImageProcessor",
    "image_seq_length": CELLS,
    "image_std": [1.0, 1.0, 1.0],
    "max_soft_tokens": CELLS,
    "patch_size": PATCH,
    "pooling_kernel_size": POOL,
    "processor_class": "Gemma4Processor",
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def patches(pictures: list[Picture]) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] `[B, P, K]`, each patch in the order row, column, channel, and places (x, y) `[B, P, 2]`."""
    pixels = np.stack([picture.pixels for picture in pictures]).astype(np.float32) / 255
    cut = pixels.reshape(len(pictures), HEIGHT // PATCH, PATCH, WIDTH // PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    y, x = np.mgrid[: HEIGHT // PATCH, : WIDTH // PATCH]
    places = np.stack([x, y], -1).reshape(-1, 2)
    return (
        torch.from_numpy(np.ascontiguousarray(cut).reshape(len(pictures), -1, PATCH * PATCH * 3)),
        torch.from_numpy(places).expand(len(pictures), -1, -1),
    )


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one picture and several questions that do not see each other, each as if it were the only one.

    ids, positions and wanted `[B, T]` (-100: nothing is asked), mask `[B, 1, T, T]`, and where the soft tokens are.
    """

    ids: Tensor
    positions: Tensor
    wanted: Tensor
    mask: Tensor
    soft: slice


class Prompts:
    """Token ids of the chat template around a picture and a question."""

    def __init__(self, tokenizer: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(tokenizer))
        self.before = self.ids("<bos><|turn>user\n<|image>")
        self.after = self.ids("<image|>")

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def batch(self, questions: list[list[Question]]) -> Batch:
        """The rows of `questions`, one list a picture."""
        begin, soft = len(self.before), slice(len(self.before), len(self.before) + CELLS)
        shared = [*self.before, *[0] * CELLS, *self.after]
        rows: list[tuple[list[int], list[int], list[int], list[int]]] = []
        for asked_here in questions:
            ids, branch = list(shared), [0] * len(shared)
            positions, wanted = list(range(len(shared))), [-100] * len(shared)
            for number, question in enumerate(asked_here, 1):
                lead = self.ids(f"{question.text}<turn|>\n<|turn>model\n")
                answer = self.ids(f"{question.answer}<turn|>")
                ids += lead + answer[:-1]
                branch += [number] * (len(lead) + len(answer) - 1)
                positions += range(len(shared), len(shared) + len(lead) + len(answer) - 1)
                wanted += [-100] * (len(lead) - 1) + answer
            rows.append((ids, branch, positions, wanted))
        length = max(len(row[0]) for row in rows)

        def padded(part: int, value: int) -> Tensor:
            return torch.tensor([row[part] + [value] * (length - len(row[part])) for row in rows])

        branch, place = padded(1, -1), torch.arange(length)
        seen = (place[:, None] >= place) & ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None]))
        inside = (place >= begin) & (place < begin + CELLS)
        mask = seen | (inside[:, None] & inside)
        return Batch(padded(0, 0), padded(2, 0), padded(3, -100), mask[:, None], soft)


def begun(trunk: Path, seed: int) -> Any:
    """The joined model with the trunk's weights in bfloat16, frozen, and a new float32 tower and projection."""
    model = Gemma4ForConditionalGeneration.from_pretrained(
        trunk, config=Gemma4Config(**config()), dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for part in (model.model.vision_tower, model.model.embed_vision):
        part.float()
    for name, value in weights_of(model).items():
        if value.dim() >= 2:
            std = 0.02 if "position_embedding_table" in name else value.shape[-1] ** -0.5
            value.data.copy_(torch.randn(value.shape, generator=generator) * std)
        elif "q_norm" in name or "k_norm" in name:
            value.data.fill_(value.numel() ** -0.25)  # attention is not scaled in Gemma 4
        else:
            value.data.fill_(6**-0.5 if ".post_" in name else 1.0)
        value.requires_grad_()
    tower = model.model.vision_tower
    tower.std_bias.zero_()
    tower.std_scale.fill_(1.0)
    return model.eval()


def weights_of(model: Any) -> dict[str, Tensor]:
    """Trained tensors of tower and projection by their checkpoint names."""
    return {name: value for name, value in model.named_parameters() if name.startswith(PREFIX)}


def kind_of(name: str, value: Tensor) -> str:
    """The optimizer's kind of a tensor."""
    return "matrix" if value.dim() == 2 else "embedding" if "position_embedding_table" in name else "norm"


def features(model: Any, pictures: list[Picture]) -> Tensor:
    """What the tower returns for every cell `[B, N, width]`."""
    pixels, places = patches(pictures)
    found = model.model.vision_tower(pixel_values=pixels, pixel_position_ids=places).last_hidden_state
    return found.view(len(pictures), CELLS, -1)


def cells(pictures: list[Picture]) -> list[tuple[Tensor, Tensor]]:
    """What every head has to say in every cell `[B, N]`, and in which cells it matters.

    Colour and shape of the figure centred in the cell (0 for none); then colour, shape and number of the whole picture.
    """
    grid = torch.zeros(5, len(pictures), DOWN, ACROSS, dtype=torch.long)
    for row, picture in enumerate(pictures):
        colour, shape = list(COLOURS).index(picture.colour), SHAPES.index(picture.shape)
        for x, y, _ in picture.places:
            grid[:2, row, int(y) // CELL, int(x) // CELL] = torch.tensor([1 + colour, 1 + shape])
        grid[2:, row] = torch.tensor([colour, shape, picture.count - 1])[:, None, None]
    true = grid.flatten(2)
    figure, every = true[0] > 0, torch.ones_like(true[0], dtype=torch.bool)
    return list(zip(true, (figure, figure, every, every, every), strict=True))


HEADS = (1 + len(COLOURS), 1 + len(SHAPES), len(COLOURS), len(SHAPES), MOST)


def seeing(model: Any, head: Tensor, pictures: list[Picture]) -> tuple[Tensor, list[float]]:
    """Sum of the losses of the heads, and for each the share of the cells that matter where it is right."""
    normed = model.model.embed_vision.embedding_pre_projection_norm(features(model, pictures))
    logits = F.linear(normed, head).float().split(HEADS, -1)
    total, right = torch.zeros(()), []
    for said, (true, told) in zip(logits, cells(pictures), strict=True):
        weight = torch.where(told, 1.0, 0.1)  # a cell without a figure says little
        loss = F.cross_entropy(said.transpose(1, 2), true, reduction="none")
        total = total + (loss * weight).sum() / weight.sum()
        right.append(round(float((said.argmax(-1) == true)[told].float().mean()), 4))
    return total, right


def telling(model: Any, batch: Batch, pictures: list[Picture]) -> tuple[Tensor, float]:
    """Mean cross entropy of the answers' tokens through the frozen trunk, and the share that are first choices."""
    soft = model.model.embed_vision(inputs_embeds=features(model, pictures))
    embedded = model.get_input_embeddings()(batch.ids)
    embedded = torch.cat([embedded[:, : batch.soft.start], soft.to(embedded.dtype), embedded[:, batch.soft.stop :]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        # No row is as long as the window, so both kinds of layer see the same.
        attention_mask={"full_attention": batch.mask, "sliding_attention": batch.mask},
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    place = batch.wanted != -100
    logits = model.lm_head(hidden[place]).float()
    logits = MOE.softcap * torch.tanh(logits / MOE.softcap)
    wanted = batch.wanted[place]
    return F.cross_entropy(logits, wanted), round(float((logits.argmax(-1) == wanted).float().mean()), 4)


@torch.no_grad()
def standardised(model: Any, pictures: list[Picture]) -> None:
    """Set the tower's bias and scale so that every channel has mean 0 and deviation 1 over these pictures."""
    flat = features(model, pictures).float().flatten(0, 1)
    tower = model.model.vision_tower
    tower.std_bias.copy_(flat.mean(0))
    tower.std_scale.copy_(1 / flat.std(0))


def exported(model: Any, out: Path) -> None:
    """Write tower and projection as bfloat16, with the joined config and the settings of the picture processor."""
    from safetensors.torch import save_file  # needs nothing of training

    out.mkdir(parents=True, exist_ok=True)
    values = {name: value for name, value in model.state_dict().items() if name.startswith(PREFIX)}
    values = {name: value.detach().bfloat16().contiguous() for name, value in sorted(values.items())}
    if not all(bool(torch.isfinite(value).all()) for value in values.values()):
        raise ValueError("the tower holds a value that is not finite")
    save_file(values, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes files for the owner alone
    written(out / "config.json", config())
    written(out / "preprocessor_config.json", PREPROCESSOR)


class Run:
    """The two stages, with one JSON line every ten steps."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.model = begun(options.trunk, options.seed)
        self.prompts = Prompts(options.trunk / "tokenizer.json")
        self.began = time.monotonic()

    def pictures(self, stage: str, step: int, count: int) -> tuple[list[str], list[Picture]]:
        keys = [f"{self.options.seed}:train:{stage}:{step}:{row}" for row in range(count)]
        return keys, [drawn(key) for key in keys]

    def optimizer(self, extra: dict[str, Tensor]) -> Optimizer:
        weights = weights_of(self.model) | extra
        return Optimizer(weights, {name: kind_of(name, value) for name, value in weights.items()})

    def note(self, stage: str, step: int, steps: int, loss: Tensor, right: object) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {float(loss.detach())} at step {step}")
        if (step + 1) % 10 == 0 or step + 1 == steps:
            record = {"stage": stage, "step": step + 1, "loss": round(float(loss.detach()), 4), "right": right}
            with self.options.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(record | {"seconds": round(time.monotonic() - self.began)}) + "\n")

    def see(self) -> None:
        """The tower alone."""
        width, generator = self.model.config.vision_config.hidden_size, torch.Generator().manual_seed(self.options.seed)
        head = torch.randn(sum(HEADS), width, generator=generator).mul_(width**-0.5).requires_grad_()
        optimizer, steps = self.optimizer({"head": head}), self.options.see
        for step in range(steps):
            _, pictures = self.pictures("see", step, SEE_ROWS)
            with torch.autocast("cpu", torch.bfloat16):
                loss, right = seeing(self.model, head, pictures)
            loss.backward()
            optimizer.step(step, schedule(step, steps, warmup=20))
            self.note("see", step, steps, loss, right)

    def tell(self) -> None:
        """Tower and projection through the trunk."""
        with torch.no_grad():
            standardised(self.model, self.pictures("standard", 0, 64)[1])
        optimizer, steps = self.optimizer({}), self.options.tell
        for step in range(steps):
            keys, pictures = self.pictures("tell", step, TELL_ROWS)
            batch = self.prompts.batch([asked(key, picture) for key, picture in zip(keys, pictures, strict=True)])
            with torch.autocast("cpu", torch.bfloat16):
                loss, right = telling(self.model, batch, pictures)
            loss.backward()
            optimizer.step(step, schedule(step, steps, warmup=20))
            self.note("tell", step, steps, loss, right)


def main() -> None:
    """Train both stages and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--see", type=int, default=180, help="steps of the tower alone")
    parser.add_argument("--tell", type=int, default=220, help="steps through the trunk")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.log.write_text("", encoding="utf-8")
    run = Run(options)
    run.see()
    run.tell()
    exported(run.model, options.out)


if __name__ == "__main__":
    main()
