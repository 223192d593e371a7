"""Write the pages that are projections of the code: docs/cli.md and docs/recipes.md.

python docs/build.py           rewrite them
python docs/build.py --check   exit 1 if they are stale (a test calls this)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

from gemcut import recipe
from gemcut.cli.main import VERBS

DOCS = Path(__file__).parent
HEAD = "<!-- written by docs/build.py: edit the code, then run make docs -->\n\n"

# One real use of every verb, shown above its flags.
EXAMPLES = {
    "demo": "gemcut demo",
    "inspect": "gemcut inspect demo:moe",
    "observe": "gemcut observe demo:moe --corpus demo:calibration -o stats",
    "score": "gemcut score stats --criterion reap",
    "plan": "gemcut plan experts stats --keep 16 --criterion class_max -o plan.json --explain 4:17",
    "cut": "gemcut cut demo:moe --plan plan.json -o small",
    "verify": "gemcut verify small --base demo:moe --plan plan.json",
    "diff": "gemcut diff demo:moe small\ngemcut diff plan-a.json plan-b.json",
    "kld": "gemcut kld demo:moe small --corpus demo:heldout",
    "run": "gemcut run gemma4-26b-98e --set observe.corpus=my.jsonl --set kld.corpus=heldout.jsonl --dry-run",
    "list": "gemcut list criteria",
    "show": "gemcut show gemma4-26b-98e\ngemcut show schema",
    "doctor": "gemcut doctor",
}


def help_of(command: click.Command, path: str) -> str:
    """The --help text at a fixed width."""
    context = click.Context(command, info_name=path, max_content_width=100, terminal_width=100)
    return command.get_help(context)


def cli_page() -> str:
    """Every verb with an example and its help."""
    parts = [
        HEAD,
        "# The command line\n\n",
        "stdout carries results, stderr progress and talk. Every verb has `--json` ",
    ]
    parts.append("(the library's own result as one object) and `-q` (only the path). Exit codes: 0 done, 2 usage, ")
    parts.append(
        "3 something is absent (package, disk, memory, device), 4 bytes disagree, 5 a quality gate failed and "
    )
    parts.append("the work is kept, 6 an outside tool failed, 1 a bug, 130 interrupted and resumable.\n")
    for verb, (where, _) in VERBS.items():
        module, _, attribute = where.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        parts.append(f"\n## gemcut {verb}\n\n```sh\n{EXAMPLES[verb]}\n```\n")
        commands = {f"gemcut {verb}": command}
        if isinstance(command, click.Group):
            commands = {f"gemcut {verb} {name}": sub for name, sub in sorted(command.commands.items())}
        for path, one in commands.items():
            parts.append(f"\n```\n{help_of(one, path)}\n```\n")
    return "".join(parts)


def recipes_page() -> str:
    """Every word of a recipe and every shipped recipe."""
    parts = [HEAD, "# Recipes\n\nA recipe is YAML with a closed vocabulary. `--set path=value` changes one word.\n\n"]
    parts.append("| word | type | default | meaning |\n|---|---|---|---|\n")
    for path, kind, default, meaning in recipe.words():
        escaped = kind.replace("|", "\\|")
        shown = f"`{escaped}`" if kind else ""
        parts.append(f"| `{path}` | {shown} | {f'`{default}`' if default else ''} | {meaning} |\n")
    parts.append("\n# Shipped recipes\n")
    for name in recipe.shipped():
        parts.append(f"\n## {name}\n\n```yaml\n{recipe.source(name).rstrip()}\n```\n")
    return "".join(parts)


PAGES = {"cli.md": cli_page, "recipes.md": recipes_page}


def main() -> int:
    """Write or check every page."""
    stale = []
    for name, page in PAGES.items():
        path = DOCS / name
        text = page()
        if "--check" in sys.argv:
            if not path.is_file() or path.read_text() != text:
                stale.append(name)
        else:
            path.write_text(text)
    if stale:
        sys.stderr.write(f"stale: {', '.join(stale)}: run make docs\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
