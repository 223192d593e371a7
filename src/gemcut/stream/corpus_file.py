"""A corpus file as it lies on disk: JSON lines, or plain text. Nothing here knows a tokenizer.

A JSON line is `{"id", "class", "messages": [...] or "text", "weight"}`; unknown keys are refused, because a misspelt
`wieght` that is ignored changes every statistic. Files are cut at `\\n` bytes only: U+2028, U+0085 and form feeds are
text, and `str.splitlines` would cut there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from gemcut.errors import UsageError
from gemcut.types import Json

# A context of 262,144 tokens is about 1 MB of text; a longer line is a file in another format.
MAX_LINE_BYTES = 8 << 20
# Plain text is tokenised in pieces of about this many characters, cut at line ends.
PIECE_CHARACTERS = 1 << 20
TEXT_CLASS = "text"
FORMS = "a .jsonl or .txt file, demo:calibration or demo:heldout"  # of a corpus, for errors

TextItems = Literal["blocks", "chunks"]


def _printable(name: str) -> str:
    """Ids and classes appear in tables, errors and cards: no control characters, no blank ends."""
    if not name.isprintable() or name != name.strip():
        raise ValueError("a name with control characters, or with blanks around it")
    return name


Name = Annotated[str, StringConstraints(min_length=1, max_length=512), AfterValidator(_printable)]


class Message(BaseModel):
    """One turn. `reasoning_content` belongs to the assistant and goes into the thinking channel."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _reasoning_is_the_assistants(self) -> Self:
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError(f"reasoning_content in a {self.role} message: only an assistant thinks")
        return self


class Record(BaseModel):
    """One corpus item: exactly one of `messages` and `text`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Name
    cls: Name = Field(alias="class")
    messages: tuple[Message, ...] | None = Field(default=None, strict=False)
    text: str | None = None
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_of_messages_and_text(self) -> Self:
        if (self.messages is None) == (self.text is None):
            raise ValueError("exactly one of 'messages' and 'text' is needed")
        if self.messages is not None:
            if not any(m.content.strip() for m in self.messages):
                raise ValueError("the messages are blank")
            if any(m.role == "system" for m in self.messages[1:]):
                raise ValueError("a system message may only come first")
        elif self.text is not None and not self.text.strip():
            raise ValueError("the text is blank")
        return self


@dataclass(frozen=True, slots=True)
class Entry:
    """A record and the line where it begins (1-based), for errors."""

    record: Record
    line: int


def read_entries(path: Path) -> Iterator[Entry]:
    """Every item of a corpus file: `.txt` gives one item per blank-line separated block, everything else is JSON lines.

    Raises:
        UsageError: no such file, not UTF-8, a line over MAX_LINE_BYTES, a bad record, an id used twice, no items.
    """
    lines = _lines(path)
    entries = _blocks(lines, path) if path.suffix == ".txt" else _records(lines, path)
    seen: dict[str, int] = {}
    for entry in entries:
        if entry.record.id in seen:
            raise UsageError(
                f"the corpus has two items named {entry.record.id!r}",
                where=f"{path.name}, lines {seen[entry.record.id]} and {entry.line}",
                hint="ids must be unique: questions are counted and resampled by them",
            )
        seen[entry.record.id] = entry.line
        yield entry
    if not seen:
        blank = path.stat().st_size > 0
        raise UsageError("the corpus has only blank lines" if blank else "the corpus is empty", where=path.name)


def read_pieces(path: Path) -> Iterator[str]:
    """A plain text file in pieces of about PIECE_CHARACTERS, cut at line ends; their concatenation is the file."""
    piece: list[str] = []
    size = 0
    for _, line in _lines(path):
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, text with its newline). A byte order mark at the start is dropped."""
    if not path.exists():
        raise UsageError("there is no corpus file", where=str(path), wanted=FORMS)
    if not path.is_file():
        raise UsageError("the corpus is not a file", where=str(path))
    offset = 0
    with open(path, "rb") as f:
        for number, raw in enumerate(iter(lambda: f.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if len(raw) > MAX_LINE_BYTES:
                raise UsageError(
                    "a line of the corpus is too long",
                    where=f"{path.name}, line {number}",
                    wanted=f"at most {MAX_LINE_BYTES >> 20} MiB",
                    hint="write one JSON object per line, or cut the text into items",
                )
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    "the corpus is not UTF-8",
                    where=f"{path.name}, line {number}, byte {offset + error.start} of the file",
                    got=f"0x{raw[error.start]:02x} ({error.reason})",
                    hint="convert the file to UTF-8 first",
                ) from None
            if number == 1:
                text = text.removeprefix("\ufeff")
            yield number, text
            offset += len(raw)


def _records(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[Entry]:
    for number, line in lines:
        if line.strip():
            yield Entry(_parse(line, f"{path.name}, line {number}"), number)


def _parse(line: str, where: str) -> Record:
    try:
        value = json.loads(line, object_pairs_hook=_once, parse_constant=_no_constant)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # refuses half a surrogate pair, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the corpus line is not JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise UsageError("the corpus line is not a JSON object", where=where, got=type(value).__name__)
    try:
        return Record.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        name = value.get("id")
        raise UsageError(
            f"the corpus item does not fit: {message}" + (f" (at {field!r})" if field else ""),
            where=where + (f", item {name!r}" if isinstance(name, str) else ""),
            wanted="id, class, messages (system, user, assistant) or text, and an optional weight above 0",
        ) from None


def _once(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key is repeated")
    return out


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _blocks(lines: Iterable[tuple[int, str]], path: Path) -> Iterator[Entry]:
    """Blank-line separated blocks; a block that would exceed MAX_LINE_BYTES characters is refused like a line."""
    block: list[str] = []
    size = start = count = 0
    for number, line in lines:
        if line.strip():
            if not block:
                start = number
            block.append(line)
            size += len(line)
            if size > MAX_LINE_BYTES:
                raise UsageError(
                    "a block of the corpus is too long",
                    where=f"{path.name}, from line {start}",
                    wanted=f"at most {MAX_LINE_BYTES >> 20} MiB between blank lines",
                    hint="cut the whole file into chunks instead of blocks",
                )
        elif block:
            count += 1
            yield Entry(_text_record(count, block), start)
            block, size = [], 0
    if block:
        yield Entry(_text_record(count + 1, block), start)


def _text_record(count: int, block: list[str]) -> Record:
    return Record.model_validate(
        {"id": f"block-{count:06d}", "class": TEXT_CLASS, "text": "".join(block).rstrip("\r\n")}
    )
