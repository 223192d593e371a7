"""The vocabulary of a checkpoint as GGUF metadata: what llama.cpp's converter writes for a Gemma 4 tokenizer.

Types of tokens (the file's numbers): a byte `<0x0A>` is BYTE, a special token is CONTROL, and the chat and tool markers
are USER_DEFINED in spite of that, so that a server sees them in the text and can parse reasoning and tool calls.
Special is what tokenizer_config.json names, as for the converter, and also what tokenizer.json marks so: llama.cpp
would split a NORMAL one into pieces. Scores are unused and all -1000. llama.cpp puts BOS before every text of this
model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gemcut.checkpoint.header import parse_object
from gemcut.errors import CheckpointError
from gemcut.families.gguf import Value
from gemcut.types import Json

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
SCORE = -1000.0
TEXT_MARKERS = frozenset(
    {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
)
# kinds of special tokens, in the order of the file, and how the keys call them
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls",
           "mask": "mask"}  # fmt: skip
_CLASS_DEFAULTS = ("<unk>", "<bos>", "<eos>", "<pad>", "<mask>")
_SPACE = "\u0120"  # a space inside a part of a merge
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_FILE_BYTES = 256 << 20
_MAX_TOKENS = 1 << 22


def tokenizer_metadata(folder: Path, *, rows: int | None = None) -> dict[str, Value]:
    """`tokenizer.*` keys of a GGUF file, in the converter's order.

    Args:
        rows: rows of the token embedding; llama.cpp refuses a file where the vocabulary has another size.
    Raises:
        CheckpointError: a file is missing, too large, not JSON, no BPE with byte fallback; ids are repeated or have
            gaps; a special token is not in the vocabulary; no file says which tokens are BOS and EOS; the vocabulary
            has not as many tokens as `rows`.
    """
    folder = Path(folder)
    tokenizer = read_object(folder, "tokenizer.json", required=True)
    config = read_object(folder, "tokenizer_config.json", required=True)
    model_config = read_object(folder, "config.json")
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise CheckpointError("the tokenizer is no BPE with byte fallback", where="tokenizer.json: model")
    added = _added_tokens(tokenizer)
    tokens, base = _tokens(model, added)
    if rows is not None and len(tokens) != rows:
        raise CheckpointError(
            "the tokenizer and the embedding have different sizes",
            where="tokenizer.json",
            got=f"{len(tokens)} tokens, {rows} rows",
            hint="give tokenizer.json an unused token for every row",
        )
    special = _named_special(folder, config, tokens) | _marked_special(tokenizer)
    out = {
        "tokenizer.ggml.model": Value("str", "gemma4"),
        "tokenizer.ggml.tokens": Value("str", tuple(tokens)),
        "tokenizer.ggml.scores": Value("f32", (SCORE,) * len(tokens)),
        "tokenizer.ggml.token_type": Value("i32", tuple(_type(t, i, base, special) for i, t in enumerate(tokens))),
    }
    out["tokenizer.ggml.merges"] = Value("str", _merges(model.get("merges")))
    for kind, token_id in _special_ids(config, model_config, tokens).items():
        out[f"tokenizer.ggml.{SPECIAL[kind]}_token_id"] = Value("u32", token_id)
    for kind, adds in _adds(tokenizer, config).items():
        out[f"tokenizer.ggml.add_{kind}_token"] = Value("bool", adds)
    out.update(_templates(folder, config))
    out["tokenizer.ggml.add_space_prefix"] = Value("bool", False)
    out["tokenizer.ggml.add_bos_token"] = Value(
        "bool", True
    )  # whatever the files say: keeps its place if already there
    return out


def read_object(folder: Path, file: str, *, required: bool = False) -> dict[str, Json]:
    """A JSON object of the folder; empty where the file is missing and not required.

    Raises:
        CheckpointError: missing, too large, unreadable, or not a JSON object.
    """
    return parse_object(raw, file, file) if (raw := read_bytes(folder, file, required=required)) is not None else {}


def read_bytes(folder: Path, file: str, *, required: bool = False) -> bytes | None:
    """A file of the folder, None where it is missing and not required.

    Raises:
        CheckpointError: missing, too large, or unreadable.
    """
    try:
        with (folder / file).open("rb") as stream:
            raw = stream.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if not required:
            return None
        raise CheckpointError(
            f"the folder has no {file}", where=folder.name, hint="a GGUF holds the tokenizer: put it beside the weights"
        ) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}", where=folder.name) from None
    if len(raw) > _MAX_FILE_BYTES:
        raise CheckpointError(f"{file} is too large", where=folder.name, wanted=f"at most {_MAX_FILE_BYTES >> 20} MiB")
    return raw


def _added_tokens(tokenizer: Mapping[str, Json]) -> dict[str, int]:
    """`added_tokens`: content → id."""
    entries = tokenizer.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError("added_tokens is no list", where="tokenizer.json")
    out: dict[str, int] = {}
    seen: set[int] = set()
    for entry in entries:
        content = entry.get("content") if isinstance(entry, dict) else None
        token_id = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(content, str) or isinstance(token_id, bool) or not isinstance(token_id, int):
            raise CheckpointError("an added token without content and id", where="tokenizer.json", got=repr(entry)[:80])
        if content in out or token_id in seen:
            raise CheckpointError(
                "an added token is repeated", where="tokenizer.json", got=f"{content[:60]!r}, id {token_id}"
            )
        out[content] = token_id
        seen.add(token_id)
    return out


def _tokens(model: Mapping[str, Json], added: Mapping[str, int]) -> tuple[list[str], int]:
    """Every token by its id, and how many of them the model's own vocabulary has (they come first).

    Raises:
        CheckpointError: an id is repeated, out of range or missing, or two lists disagree about a token.
    """
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not 0 < len(vocabulary) <= _MAX_TOKENS:
        raise CheckpointError("the tokenizer has no vocabulary", where="tokenizer.json: model.vocab")
    ids: dict[str, Json] = {**vocabulary}
    for token, added_id in added.items():
        if ids.setdefault(token, added_id) != added_id:
            raise CheckpointError(
                "the vocabulary and added_tokens give a token two ids", where="tokenizer.json", got=repr(token)[:80]
            )
    slots: list[str | None] = [None] * len(ids)
    for token, token_id in ids.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < len(slots):
            raise CheckpointError(
                "a token's id is out of range: ids must be 0, 1, 2 … without a gap",
                where="tokenizer.json",
                got=f"{token[:60]!r}: {token_id}",
                wanted=f"below {len(slots)}",
            )
        if slots[token_id] is not None:
            raise CheckpointError(
                "two tokens have the same id", where="tokenizer.json", got=f"{slots[token_id]!r:.60} and {token!r:.60}"
            )
        slots[token_id] = token
    tokens = [token for token in slots if token is not None]
    late = next((t for t in tokens[: len(vocabulary)] if t not in vocabulary), None)
    if late is not None:
        raise CheckpointError(
            "an added token stands among the vocabulary's own ids", where="tokenizer.json", got=repr(late)[:80]
        )
    return tokens, len(vocabulary)


def _content(value: Json) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with `content`."""
    inner = value.get("content") if isinstance(value, dict) else value
    return inner if isinstance(inner, str) else None


def _named_special(folder: Path, config: Mapping[str, Json], tokens: Sequence[str]) -> frozenset[str]:
    """Tokens that the tokenizer calls special: every `*_token`, the lists of further ones, the class's own defaults.

    Raises:
        CheckpointError: one of them is not in the vocabulary.
    """
    known = frozenset(tokens)
    entries: dict[str, Json] = {**config}
    if "added_tokens_decoder" not in config:
        entries.update(read_object(folder, "special_tokens_map.json"))
    named = {key: _content(value) for key, value in entries.items() if key.endswith("_token")}
    further = entries.get("extra_special_tokens") or entries.get("additional_special_tokens") or []
    specific = entries.get("model_specific_special_tokens") or {}
    lists = [part.items() if isinstance(part, dict) else enumerate(part) for part in (further, specific)
             if isinstance(part, (dict, list))]  # fmt: skip
    for key, value in (pair for part in lists for pair in part):
        named[f"further {key}"] = _content(value)
    for key, token in named.items():
        if token is not None and token not in known:
            raise CheckpointError(
                "the vocabulary lacks a special token", where=f"tokenizer_config.json: {key}", got=token[:60]
            )
    if str(config.get("tokenizer_class", "GemmaTokenizer")).startswith("GemmaTokenizer"):
        named.update((f"default {token}", token) for token in _CLASS_DEFAULTS if token in known)
    return frozenset(token for token in named.values() if token is not None)


def _marked_special(tokenizer: Mapping[str, Json]) -> frozenset[str]:
    """Added tokens that tokenizer.json itself calls special; `_added_tokens` has checked the list."""
    entries = tokenizer.get("added_tokens")
    marked = [one for one in entries if isinstance(one, dict)] if isinstance(entries, list) else []
    return frozenset(str(one["content"]) for one in marked if one.get("special") is True)


def _type(token: str, token_id: int, base: int, special: frozenset[str]) -> int:
    if token in TEXT_MARKERS:
        return USER_DEFINED
    if token_id < base and _BYTE.fullmatch(token):
        return BYTE
    if token in special:
        return CONTROL
    return NORMAL if token_id < base else USER_DEFINED


def _merges(merges: Json) -> tuple[str, ...]:
    """`a b` for every merge, in order; a space inside a part is written as _SPACE.

    Raises:
        CheckpointError: there are none, or an entry is neither "a b" nor ["a", "b"].
    """
    if not isinstance(merges, list) or not merges:
        raise CheckpointError(
            "the tokenizer has no merges, and llama.cpp loads none without", where="tokenizer.json: model.merges"
        )
    out: list[str] = []
    for merge in merges:
        match merge:
            case str() if merge.count(" ") == 1:
                out.append(merge)
            case [str() as a, str() as b] if a and b:
                spaced = " " in a or " " in b
                out.append(f"{a.replace(' ', _SPACE)} {b.replace(' ', _SPACE)}" if spaced else f"{a} {b}")
            case _:
                raise CheckpointError("a merge is no pair", where="tokenizer.json: model.merges", got=repr(merge)[:80])
    return tuple(out)


def _special_ids(config: Mapping[str, Json], model_config: Mapping[str, Json], tokens: Sequence[str]) -> dict[str, int]:
    """bos, eos … → id: what tokenizer_config.json names, then what only config.json has. A list of ids there, of
    all that end an answer, names none of them.

    Raises:
        CheckpointError: an id is outside the vocabulary, or there is none of BOS or EOS: llama.cpp would take those of
            another family.
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    out: dict[str, int] = {}
    for kind in SPECIAL:
        token = _content(config.get(f"{kind}_token"))
        if token is not None and token in ids:
            out[kind] = ids[token]
    text = model_config.get("text_config")
    unused: dict[str, Json] = {}
    for kind in SPECIAL:
        token_id = model_config.get(f"{kind}_token_id")
        if token_id is None and isinstance(text, dict):
            token_id = text.get(f"{kind}_token_id")
        if isinstance(token_id, int) and not isinstance(token_id, bool):
            out.setdefault(kind, token_id)
        elif token_id is not None:
            unused[kind] = token_id
    for kind in ("bos", "eos"):
        if kind not in out:
            raise CheckpointError(
                f"no file says which token is {kind.upper()}",
                where="tokenizer_config.json",
                got=f"no {kind}_token" + (f"; {kind}_token_id {unused[kind]} in config.json" if kind in unused else ""),
                wanted=f'"{kind}_token": "<{kind}>"',
                hint="copy tokenizer_config.json from the original model, or add this line",
            )
    for kind, token_id in out.items():
        if not 0 <= token_id < len(tokens):
            raise CheckpointError(
                "a special token's id is outside the vocabulary",
                where=f"config.json: {kind}_token_id",
                got=token_id,
                wanted=f"below {len(tokens)}",
            )
    return out


def _adds(tokenizer: Mapping[str, Json], config: Mapping[str, Json]) -> dict[str, bool]:
    """Which of bos, eos, sep the tokenizer puts around a text: its post-processor, then tokenizer_config.json.

    Raises:
        CheckpointError: a post-processor that ends texts with a token other than EOS.
    """
    out: dict[str, bool] = {}
    bos, eos, sep = (_content(config.get(f"{kind}_token")) for kind in ("bos", "eos", "sep"))
    post = tokenizer.get("post_processor")
    post = post if isinstance(post, dict) else {}
    inner = post.get("processors", [post])
    for processor in inner if isinstance(inner, list) else []:
        if not isinstance(processor, dict) or processor.get("type") != "TemplateProcessing":
            continue
        single, pair = (_template_ids(processor.get(key)) for key in ("single", "pair"))
        if len(single) < 2:
            continue
        if single[0]:
            out["bos"] = single[0] == bos
        if single[-1]:
            if single[-1] != eos:
                raise CheckpointError(
                    "the tokenizer ends texts with another token than EOS", where="tokenizer.json", got=single[-1][:60]
                )
            out["eos"] = True
        start = 1 if single[0] and pair[:1] == [single[0]] else 0
        stop = -1 if single[-1] and pair[-1:] == [single[-1]] else len(pair)
        between = pair[start:stop][1:-1]
        if between:
            out["sep"] = (between[0] in (sep, eos) and not single[-1]) or between[1:] in ([sep], [eos])
    for kind in ("bos", "eos", "sep"):
        said = config.get(f"add_{kind}_token")
        if isinstance(said, bool):
            out.setdefault(kind, said)
    return out


def _template_ids(parts: Json) -> list[str]:
    """A template's members: the special token's text, "" for a place where text goes."""
    out: list[str] = []
    for part in parts if isinstance(parts, list) else []:
        special = part.get("SpecialToken") if isinstance(part, dict) else None
        token = special.get("id") if isinstance(special, dict) else None
        out.append(token if isinstance(token, str) else "")
    return out


def _templates(folder: Path, config: Mapping[str, Json]) -> dict[str, Value]:
    """The chat template: of tokenizer_config.json, else chat_template.jinja with its further ones, else
    chat_template.json. Named ones get keys of their own, and the one called default the plain key."""
    said = config.get("chat_template")
    if said is None:
        jinja = _read_text(folder, "chat_template.jinja")
        further = sorted((folder / "additional_chat_templates").glob("*.jinja")) if jinja else []
        more = {path.stem: _read_text(path.parent, path.name) for path in further}
        if jinja is None:
            said = read_object(folder, "chat_template.json").get("chat_template")
        elif more:
            said = [{"name": name, "template": text} for name, text in {"default": jinja, **more}.items()]
        else:
            said = jinja
    if isinstance(said, str):
        return {"tokenizer.chat_template": Value("str", said)} if said else {}
    named: dict[str, str] = {}
    for entry in said if isinstance(said, list) else []:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if isinstance(name, str) and name and isinstance(text, str) and text:
            named[re.sub(r"[^A-Za-z0-9]", "_", name)] = text
    default = named.pop("default", None)
    out = {f"tokenizer.chat_template.{name}": Value("str", text) for name, text in named.items()}
    if named:
        out["tokenizer.chat_templates"] = Value("str", tuple(sorted(named)))
    if default is not None:
        out["tokenizer.chat_template"] = Value("str", default)
    return out


def _read_text(folder: Path, file: str) -> str | None:
    raw = read_bytes(folder, file)
    try:
        return None if raw is None else raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is no UTF-8 text", where=folder.name) from None
