"""Tiny random Gemma 4 checkpoints, written as real folders: flat config keys, shards, index, tokenizer, template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

Kind = Literal["moe", "dense", "moe-text", "dense-text"]

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"]
VOCABULARY = 320  # specials, 256 bytes, a few merges' worth of room

TEMPLATE = """{{ bos_token }}{% if enable_thinking is defined and enable_thinking %}<|turn>system
<|think|><turn|>
{% endif %}{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{% if m.get('reasoning_content') %}<|channel>thought
{{ m['reasoning_content'] }}<channel|>{% endif %}{{ m['content'] }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""


def text_config(kind: Kind, **overrides: Any) -> dict[str, Any]:
    """Flat keys, as the original checkpoints have them."""
    config: dict[str, Any] = {
        "model_type": "gemma4_text",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "use_double_wide_mlp": False,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "sliding_window": 8,
        "max_position_embeddings": 512,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_bidirectional_attention": None,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "enable_moe_block": False,
        "num_experts": None,
        "top_k_experts": None,
        "moe_intermediate_size": None,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
    }
    if kind.startswith("moe"):
        config.update(enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=32)
    config.update(overrides)
    return config


def full_config(kind: Kind, dtype: str = "bfloat16", **overrides: Any) -> dict[str, Any]:
    """config.json of the wrapper or of the text-only class."""
    text = text_config(kind, **overrides)
    if kind.endswith("-text"):
        return {"architectures": ["Gemma4ForCausalLM"], "dtype": dtype, **text}
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": dtype,
        "text_config": {**text, "dtype": dtype},
        "vision_config": None,
        "audio_config": None,
        "image_token_id": 310, "boi_token_id": 311, "eoi_token_id": 312, "audio_token_id": 313, "boa_token_id": 314,
        "eoa_token_index": 315, "video_token_id": 316, "tie_word_embeddings": True,
        "pad_token_id": 0, "eos_token_id": [1, 6], "bos_token_id": 2,
    }  # fmt: skip


def make_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """A byte-level stand-in in Gemma's style: ▁ for spaces, byte fallback, Gemma 4's turn and channel markers; tokens
    that no text gives fill it up to `size`. llama.cpp wants a merge, so two of those have one."""
    vocabulary = {token: i for i, token in enumerate(SPECIALS)}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for letter in "▁etaoinshrdlu":
        vocabulary[letter] = len(vocabulary)
    free = size - len(vocabulary)
    merges = [["<unused0>", "<unused1>"]] if free > 2 else []
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    for unused in range(size - len(vocabulary)):
        vocabulary[f"<unused{unused}>"] = len(vocabulary)
    added = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, t in enumerate(SPECIALS)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
                "mask_token": "<mask>",
                "clean_up_tokenization_spaces": False,
            }
        )
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def make_tiny(
    folder: Path,
    kind: Kind = "moe",
    *,
    seed: int = 0,
    shards: int = 3,
    dtype: str = "bfloat16",
    **overrides: Any,
) -> Path:
    """Write a random tiny checkpoint. `overrides` are flat text_config keys. Returns the folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma4Config, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = full_config(kind, dtype, **overrides)
    torch.manual_seed(seed)
    if kind.endswith("-text"):
        plain = {k: v for k, v in config.items() if k not in ("architectures", "dtype")}
        model = Gemma4ForCausalLM(Gemma4TextConfig(**plain))
    else:
        plain = {k: v for k, v in config.items() if k not in ("architectures", "dtype", "text_config")}
        inner = {k: v for k, v in config["text_config"].items() if k != "dtype"}
        model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=Gemma4TextConfig(**inner), **plain))
    state = {}
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        value = tensor.detach().clone().float()
        if value.ndim <= 1:  # norms, scales: away from the all-ones start, so that a missed one shows
            value = value + 0.1 * torch.randn(value.shape, generator=generator)
        state[name] = value.to(getattr(torch, dtype)).contiguous()
    names = list(state)
    per_shard = -(-len(names) // shards)
    weight_map, total = {}, 0
    for s in range(shards):
        part = {n: state[n] for n in names[s * per_shard : (s + 1) * per_shard]}
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
        total += sum(t.numel() * t.element_size() for t in part.values())
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 6], "temperature": 1.0}) + "\n")
    make_tokenizer(folder, inner_size(config))
    return folder


def inner_size(config: dict[str, Any]) -> int:
    """Rows of the embedding."""
    return int(config.get("text_config", config)["vocab_size"])


VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
    "standardize": True,
    "use_clipped_linears": True,
}


def add_vision(folder: Path, seed: int = 1, **overrides: Any) -> Path:
    """Give a checkpoint of the wrapper kind, in one or more shards, a random vision tower in a shard of its own."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Gemma4TextConfig, Gemma4VisionConfig

    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {**VISION, **overrides}
    text = {k: v for k, v in config["text_config"].items() if k != "dtype"}
    plain = {k: v for k, v in config.items() if k not in ("architectures", "dtype", "text_config", "vision_config")}
    torch.manual_seed(seed)
    model = Gemma4ForConditionalGeneration(
        Gemma4Config(
            text_config=Gemma4TextConfig(**text), vision_config=Gemma4VisionConfig(**config["vision_config"]), **plain
        )
    )
    generator = torch.Generator().manual_seed(seed)
    tower = {}
    for name, tensor in model.state_dict().items():
        if "vision" in name:
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            value = tensor.detach().float() + noise
            if tensor.ndim == 0:  # clips are infinite at first
                value = (noise + 8.0) * (1 if name.endswith("max") else -1)
            tower[name] = value.to(torch.bfloat16).contiguous()
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        index = json.loads(index_file.read_text())
    else:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": dict.fromkeys(load_file(folder / "model-00001-of-00001.safetensors"),
                                             "model-00001-of-00001.safetensors")}  # fmt: skip
    save_file(tower, folder / "model-vision.safetensors", metadata={"format": "pt"})
    index["weight_map"].update(dict.fromkeys(tower, "model-vision.safetensors"))
    index_file.write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    picture = {"image_mean": [0.0, 0.1, 0.0], "image_std": [1.0, 1.0, 0.9], "patch_size": 4}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": picture}))
    return folder


def make_drafter(folder: Path, *, backbone: int = 64, seed: int = 2, **overrides: Any) -> Path:
    """Write a random tiny drafter for a trunk of `backbone` hidden values."""
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "vocab_size_per_layer_input": 0,
    }  # fmt: skip
    text = text_config("dense", **{**own, **overrides})
    config = {"architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant", "dtype": "bfloat16",
              "text_config": text, "backbone_hidden_size": backbone, "use_ordered_embeddings": False,
              "tie_word_embeddings": True}  # fmt: skip
    torch.manual_seed(seed)
    model = Gemma4AssistantForCausalLM(
        Gemma4AssistantConfig(
            text_config=Gemma4TextConfig(**text), backbone_hidden_size=backbone, use_ordered_embeddings=False
        )
    )
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            noise = 0.1 * torch.randn(tensor.shape, generator=generator) if tensor.ndim <= 1 else 0.0
            state[name] = (tensor.detach().float() + noise).to(torch.bfloat16).contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    make_tokenizer(folder, text["vocab_size"])
    return folder


WORDS = ("the", "nine", "rain", "on", "a", "hill", "is", "red", "and", "or", "not", "add", "two")


def write_corpus(path: Path, seed: int, items: int = 12) -> Path:
    """Corpus lines of two classes, texts and conversations, from a seed."""
    rng = random.Random(seed)
    lines = []
    for i in range(items):
        cls = ("math", "prose")[i % 2]
        text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(8, 30)))
        item: dict[str, object] = {"id": f"{cls}-{seed}-{i}", "class": cls}
        if i % 3:
            item["text"] = text
        else:
            item["messages"] = [
                {"role": "user", "content": text},
                {"role": "assistant", "reasoning_content": "so", "content": text[::-1]},
            ]
        lines.append(json.dumps(item))
    path.write_text("\n".join(lines) + "\n")
    return path
