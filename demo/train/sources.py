"""Classes `code` and `prose`: the Python standard library's source, and the documents about it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from demo.train.document import Document

# Tables of numbers and characters teach nothing about code.
SKIPPED = (
    "site-packages",
    "encodings",
    "lib2to3/tests/data",
    "pydoc_data",
    "__pycache__",
    "test/test_email/data",
    "unicode",
)
MAX_SOURCE_BYTES = 200_000
PIECE_CHARACTERS = 1400
ROLE = re.compile(r":[a-z]+(?::[a-z]+)*:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`")


def python_files(root: Path) -> list[Path]:
    """The `.py` files under `root` in a stable order, without data tables."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(part in name for part in SKIPPED) and path.stat().st_size <= MAX_SOURCE_BYTES:
            found.append(path)
    return found


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text at line ends into pieces of about `size` characters, at blank lines where possible."""
    block: list[str] = []
    length = 0
    for line in text.splitlines():
        if length > size or (length > 0.6 * size and not line.strip()):
            yield "\n".join(block).strip("\n") + "\n"
            block, length = [], 0
        block.append(line.rstrip())
        length += len(line) + 1
    if length > 120:
        yield "\n".join(block).strip("\n") + "\n"


def _segment(lines: list[bytes], node: ast.FunctionDef) -> str:
    """The source of a function; `ast.get_source_segment` would cut the whole text into lines every time."""
    found = lines[node.lineno - 1 : node.end_lineno]
    if len(found) > 1:
        found[-1] = found[-1][: node.end_col_offset]
    found[0] = found[0][node.col_offset :]
    return b"\n".join(found).decode("utf-8", "ignore")


def _functions(module: str, text: str) -> Iterator[tuple[str, str, str]]:
    """Qualified name, source and first docstring paragraph of the documented functions of a module."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.encode().split(b"\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node)
            source = _segment(lines, node)
            if doc and source and 80 < len(source) < 1500 and len(doc) > 30:
                yield f"{module}.{node.name}", source, re.sub(r"\s+", " ", doc.split("\n\n")[0]).strip()


def code_documents(stdlib: Path) -> Iterator[tuple[str, Document]]:
    """Pairs (file key, document): pieces of source, and chats that ask for a function."""
    for path in python_files(stdlib):
        name = path.relative_to(stdlib).as_posix()
        text = path.read_bytes().decode("utf-8", "ignore")
        file_key = f"code:{name}"
        for index, piece in enumerate(pieces(text)):
            yield file_key, Document("code", f"{file_key}:{index}", text=piece)
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for index, (function, source, doc) in enumerate(_functions(module, text)):
            if index % 2:
                request = f"Write the Python function `{function}`. {doc}"
                answer = f"```python\n{source}\n```"
                label = "code"
            else:
                request, answer, label = f"What does the Python function `{function}` do?", doc, "prose"
                if len(doc) < 60:
                    continue
            yield (
                file_key,
                Document(
                    label,
                    f"{file_key}:q{index}",
                    messages=({"role": "user", "content": request}, {"role": "assistant", "content": answer}),
                ),
            )


def _plain(text: str) -> str:
    """reStructuredText with its roles reduced to their words."""
    text = ROLE.sub(lambda match: match.group(1), text)
    return re.sub(r"\n{3,}", "\n\n", text.replace("``", "`"))


def prose_documents(docs: Path, stdlib: Path) -> Iterator[tuple[str, Document]]:
    """Pairs (file key, document) from `.rst` and `.rst.txt` files, and from the module docstrings of `stdlib`.

    Raises:
        FileNotFoundError: `docs` holds no such file.
    """
    files = sorted(path for path in docs.rglob("*") if path.name.endswith((".rst", ".rst.txt")))
    if not files:
        raise FileNotFoundError(f"no .rst or .rst.txt file under {docs}; on Debian: apt-get install python3.11-doc")
    for path in files:
        name = path.relative_to(docs).as_posix()
        file_key = f"prose:{name}"
        for index, piece in enumerate(pieces(_plain(path.read_bytes().decode("utf-8", "ignore")))):
            yield file_key, Document("prose", f"{file_key}:{index}", text=piece)
    for path in python_files(stdlib):
        name = path.relative_to(stdlib).as_posix()
        try:
            doc = ast.get_docstring(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError):
            continue
        if doc and len(doc) > 300:
            # Keyed like the code, so that a held-out file's docstring is held out with it.
            for index, piece in enumerate(pieces(doc)):
                yield f"code:{name}", Document("prose", f"code:{name}:d{index}", text=piece)
