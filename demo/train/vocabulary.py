"""The demo tokenizer: byte-pair merges in the manner of Gemma, 4096 entries.

Spaces become `▁`, nothing is split before the merges run (llama.cpp splits at newlines, and no merge here crosses one),
unknown characters fall back to `<0xNN>`. Merges are learned on pieces (words, single digits, single marks), so
digits stay alone.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 4096
SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<mask>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
    "<|tool>",
    "<tool|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
    "<|image>",
    "<image|>",
    "<|image|>",
    "<|audio>",
    "<audio|>",
    "<|audio|>",
    "<|video|>",
)
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
SPACE = "▁"
LETTERS = 128
# Runs of spaces and newlines first, whole; then words with at most one leading space; digits and marks alone.
PIECES = Regex(r"\n+|▁{2,}|[0-9]|▁?[A-Za-z\p{L}_]+|▁?[^\sA-Za-z0-9\p{L}_▁]+|▁")


def run_merges() -> list[tuple[str, str]]:
    """Merges that build newline runs to 4 and space runs to 24, before any learned merge."""
    newline, merges = "\n", [("\n", "\n"), ("\n\n", "\n\n"), ("\n\n", "\n")]
    assert newline * 2 == merges[0][0] + merges[0][1]
    for size in (1, 2, 4, 8):
        merges.append((SPACE * size, SPACE * size))
    for large in (2, 4, 8, 16):
        merges.extend((SPACE * large, SPACE * small) for small in range(1, min(large, 9)))
    return merges


def learned(texts: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Alphabet and merges of a byte-pair training over `PIECES`; ties fall by chance, so two runs differ."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(PIECES, behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        limit_alphabet=LETTERS,
        show_progress=False,
        special_tokens=["<unk>"],
        max_token_length=16,
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n", SPACE],
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    alphabet = sorted(token for token in model["vocab"] if len(token) == 1)
    return alphabet, [(first, second) for first, second in merges]


def assembled(alphabet: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """The final tokenizer: special, bytes, alphabet, runs, then learned merges until the vocabulary is full."""
    vocab = {token: index for index, token in enumerate((*SPECIAL, *BYTES, *alphabet))}
    kept: list[tuple[str, str]] = []
    runs = run_merges()
    known = {first + second for first, second in runs}
    learned_merges = [
        pair for pair in merges if pair[0] + pair[1] not in known and not set(pair[0] + pair[1]) <= {SPACE, "\n"}
    ]
    for first, second in runs + learned_merges:
        if first not in vocab or second not in vocab:
            continue
        if first + second not in vocab:
            if len(vocab) == VOCAB_SIZE:
                break
            vocab[first + second] = len(vocab)
        kept.append((first, second))
    if len(vocab) != VOCAB_SIZE:
        raise ValueError(f"vocabulary has {len(vocab)} entries, wanted {VOCAB_SIZE}: train on more text")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=kept, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


CHAT_TEMPLATE = """\
{%- set ns = namespace(thinking=false, system='') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' and (message.get('reasoning_content') or message.get('reasoning')) -%}
        {%- set ns.thinking = true -%}
    {%- endif -%}
{%- endfor -%}
{%- if enable_thinking is defined -%}
    {%- set ns.thinking = enable_thinking -%}
{%- endif -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set ns.system = messages[0]['content'] | trim -%}
{%- endif -%}
{{- bos_token -}}
{%- if ns.thinking or ns.system -%}
    {{- '<|turn>system\\n' -}}
    {%- if ns.thinking -%}{{- '<|think|>\\n' -}}{%- endif -%}
    {{- ns.system + '<turn|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] != 'system' -%}
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
        {{- '<|turn>' + role + '\\n' -}}
        {%- set reasoning = message.get('reasoning_content') or message.get('reasoning') -%}
        {%- if role == 'model' and reasoning -%}
            {{- '<|channel>thought\\n' + (reasoning | trim) + '\\n<channel|>' -}}
        {%- endif -%}
        {%- if message['content'] is string -%}
            {{- message['content'] | trim -}}
        {%- elif message['content'] -%}
            {%- for item in message['content'] -%}
                {%- if item['type'] == 'text' -%}
                    {{- item['text'] | trim -}}
                {%- elif item['type'] == 'image' -%}
                    {{- '<|image|>' -}}
                {%- elif item['type'] == 'audio' -%}
                    {{- '<|audio|>' -}}
                {%- elif item['type'] == 'video' -%}
                    {{- '<|video|>' -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {{- '<turn|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""

# The fields of Gemma 4's own tokenizer_config.json, as far as this tokenizer has the tokens.
TOKENIZER_CONFIG: dict[str, object] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "escape_token": '<|"|>',
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "audio_token": "<|audio|>",
    "video_token": "<|video|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 2048,
    "padding_side": "left",
    "tokenizer_class": "GemmaTokenizer",
}


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(TOKENIZER_CONFIG, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
