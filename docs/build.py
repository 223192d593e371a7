"""Write the pages that are projections of the code: docs/cli.md and docs/recipes.md.

python docs/build.py           rewrite them
python docs/build.py --check   exit 1 if they are stale (a test calls this)
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

from gemcut import recipe, records
from gemcut.cli.main import VERBS

DOCS = Path(__file__).parent
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
HEAD = "<!-- written by docs/build.py: edit the code, then run make docs -->\n\n"

# One real use of every verb, shown above its flags.
EXAMPLES = {
    "demo": "gemcut demo",
    "inspect": "gemcut inspect demo:moe",
    "observe": "gemcut observe demo:moe --corpus demo:calibration -o stats",
    "merge": "gemcut merge stats-code stats-math -o stats",
    "score": "gemcut score stats --criterion reap",
    "plan": "gemcut plan experts stats --keep 16 --criterion class_max -o plan.json --explain 4:17\n"
    "gemcut plan heads stats --model demo:dense --drop 0.125 --layers 0-3 -o plan.json",
    "ablate": "gemcut ablate demo:dense --corpus demo:calibration --method taylor --max-tokens 8000 -o importance",
    "heal": "gemcut heal demo:dense --plan plan.json --corpus demo:calibration -o healed",
    "cut": "gemcut cut demo:moe --plan plan.json -o small\n"
    "gemcut cut demo:dense --plan plan.json --heal healed -o small\n"
    "gemcut cut gguf/demo-moe-Q4_K_M.gguf --plan plan.json -o small-Q4_K_M.gguf",
    "verify": "gemcut verify small --base demo:moe --plan plan.json\n"
    "gemcut verify small-Q4_K_M.gguf --base gguf/demo-moe-Q4_K_M.gguf --plan plan.json",
    "diff": "gemcut diff demo:moe small\ngemcut diff gguf/demo-moe-Q4_K_M.gguf small-Q4_K_M.gguf\n"
    "gemcut diff plan-a.json plan-b.json",
    "imatrix": "gemcut imatrix stats -o imatrix.gguf\n"
    "gemcut imatrix demo:moe --corpus demo:calibration -o imatrix.gguf\n"
    "gemcut imatrix stats --variant auto --for IQ2_M -o imatrix.gguf\n"
    "gemcut imatrix imatrix.gguf --merge other.gguf -o both.gguf\n"
    "gemcut imatrix imatrix.gguf --model demo:moe --plan plan.json -o cut-imatrix.gguf",
    "curvature": "gemcut curvature demo:moe --corpus demo:calibration --max-tokens 12000 -o curvature",
    "gguf": "gemcut gguf demo:moe -t Q4_K_M -t Q8_0 -o gguf\n"
    "gemcut gguf demo:moe -t IQ3_M --tensor-type attn_k=q6_k --dry-run -o gguf\n"
    "gemcut gguf demo:moe --size 5.5MB --imatrix imatrix.gguf --curvature curvature -o gguf\n"
    "gemcut gguf demo:moe --fit 1GiB --context 2048 --kv q8_0 --imatrix imatrix.gguf --curvature curvature -o gguf",
    "nvfp4": "gemcut nvfp4 demo:moe -o nvfp4a16\n"
    "gemcut nvfp4 demo:moe --scheme NVFP4 --targets mlp+experts --stats stats --kv bound -o nvfp4\n"
    "gemcut nvfp4 nvfp4 --convert --layout modelopt -o nvfp4-modelopt\n"
    "gemcut verify nvfp4a16 --base demo:moe\n"
    "gemcut gguf nvfp4a16 -t NVFP4 -o gguf",
    "kld": "gemcut kld demo:moe small --corpus demo:heldout",
    "canary": "gemcut canary demo:dense small --base-answers answers.json -o canary",
    "run": "gemcut run gemma4-26b-98e --set observe.corpus=my.jsonl --set kld.corpus=heldout.jsonl --dry-run",
    "list": "gemcut list criteria",
    "show": "gemcut show gemma4-26b-98e\ngemcut show schema\n"
    "gemcut show nvfp4 --drafter demo:moe-drafter --context 1024",
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


def demo_block(run: Path) -> str:
    """The README's table and picture, from the records of a finished demo run."""
    found = {p.stem.removeprefix("kld-"): records.load_kld(p) for p in run.glob("kld-*/kld-*.json")}
    if not found:
        raise SystemExit(f"{run} has no KLD results: run gemcut demo first")
    rows = {name: next(row for row in one.rows if row.cls == "all") for name, one in found.items()}
    one = next(iter(rows.values()))
    manifest = records.load_manifest(next(run.glob("cut-*/model/manifest.json")))
    sizes = " → ".join(f"{size / 2**20:.1f}" for size in (manifest.size_bytes_before, manifest.size_bytes_after))
    lines = [
        "Which half of the experts goes decides what the cut costs. `make demo` drops 16 of 32 experts in each of 6",
        f"layers ({sizes} MiB) and measures every criterion on held-out text:",
        "",
        "| criterion | mean KLD, nats | same top token | ln PPL ratio |",
        "|---|---|---|---|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[1].mean.value):
        m, t, p = row.mean, row.same_top, row.ln_ppl_ratio
        lines.append(
            f"| {name} | {m.value:.3f} [{m.low:.3f}, {m.high:.3f}] | {100 * t.value:.1f} % [{100 * t.low:.1f}, "
            f"{100 * t.high:.1f}] | {p.value:+.3f} [{p.low:+.3f}, {p.high:+.3f}] |"
        )
    chunks = next(iter(found.values())).chunks
    lines += [
        "",
        f"*KL(base ‖ cut) over {one.tokens:,} tokens of six classes; 95 % intervals from a bootstrap over n = {chunks} "
        "chunks.*",
        "",
        "![Damage by criterion](docs/images/demo-criteria.svg)",
    ]
    return "\n".join(lines)


def fill_readme(run: Path) -> None:
    """Put the block between the README's markers, and the picture beside the docs."""
    readme = DOCS.parent / "README.md"
    head, rest = readme.read_text().split(BEGIN, 1)
    _, tail = rest.split(END, 1)
    readme.write_text(f"{head}{BEGIN}\n\n{demo_block(run)}\n\n{END}{tail}")
    (DOCS / "images").mkdir(exist_ok=True)
    (DOCS / "images" / "demo-criteria.svg").write_bytes((run / "report" / "figures" / "criteria.svg").read_bytes())


PAGES = {"cli.md": cli_page, "recipes.md": recipes_page}


def main() -> int:
    """Write or check every page."""
    if "--demo" in sys.argv:
        fill_readme(Path(sys.argv[sys.argv.index("--demo") + 1]))
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
