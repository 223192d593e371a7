"""Write a trained state as a Hugging Face folder.

`python -m demo.train.export moe --state FILE --tokenizer DIR --out DIR`
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from demo.train.architecture import PREFIX, SHAPES, Shape, tensors, text_config
from demo.train.vocabulary import SPECIAL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

END_OF_TURN = SPECIAL.index("<turn|>")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config(shape: Shape) -> dict[str, object]:
    """config.json with the flat keys of the original checkpoints, which every transformers release reads."""
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": SPECIAL.index("<|audio|>"),
        "boa_token_id": SPECIAL.index("<|audio>"),
        "boi_token_id": SPECIAL.index("<|image>"),
        "dtype": "bfloat16",
        "eoa_token_index": SPECIAL.index("<audio|>"),
        "eoi_token_id": SPECIAL.index("<image|>"),
        "eos_token_id": [1, END_OF_TURN],
        "image_token_id": SPECIAL.index("<|image|>"),
        "initializer_range": 0.02,
        "model_type": "gemma4",
        "text_config": text_config(shape),
        "tie_word_embeddings": True,
        "video_token_id": SPECIAL.index("<|video|>"),
        "vision_config": None,
    }


GENERATION = {
    "bos_token_id": 2,
    "do_sample": True,
    "eos_token_id": [1, END_OF_TURN],
    "pad_token_id": 0,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
}


def written(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def trained(shape: Shape, state: Path) -> dict[str, Tensor]:
    """The bfloat16 tensors of a training state under their checkpoint names, in the order of the layers."""
    with safe_open(state, "pt") as file:
        return {f"{PREFIX}{name}": file.get_tensor(f"weight.{name}").bfloat16() for name in tensors(shape)}


def shards(values: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Cut the tensors, in order, into `count` runs of about equal bytes."""
    total = sum(value.nbytes for value in values.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    done = 0
    for name, value in values.items():
        parts[min(count - 1, done * count // total)][name] = value
        done += value.nbytes
    return parts


def export(shape: Shape, state: Path, tokenizer: Path, out: Path) -> None:
    """Write shards, index, configs, tokenizer and template into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    values = trained(shape, state)
    if not all(bool(torch.isfinite(value).all()) for value in values.values()):
        raise ValueError("the state holds a value that is not finite")
    parts = shards(values, shape.shards)
    where: dict[str, str] = {}
    for index, part in enumerate(parts, 1):
        name = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, out / name, {"format": "pt"})
        (out / name).chmod(0o644)  # safetensors writes files for the owner alone
        where |= dict.fromkeys(part, name)
    total = sum(value.nbytes for value in values.values())
    written(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))},
    )
    written(out / "config.json", config(shape))
    written(out / "generation_config.json", GENERATION)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, out / name)


def main() -> None:
    """Export one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHAPES))
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    export(SHAPES[options.model], options.state, options.tokenizer, options.out)


if __name__ == "__main__":
    main()
