"""What there is: `list`, `show`, `doctor`."""

from __future__ import annotations

from typing import Any

import click

from gemcut.cli import options
from gemcut.cli.console import Talk

KINDS = ("recipes", "criteria", "families")


@click.command("list")
@click.argument("what", type=click.Choice(KINDS), required=False)
@options.talk
def list_(what: str | None, talk: Talk) -> None:
    """What there is: recipes, criteria, families."""
    from gemcut import families, plan_stages, recipe

    found: dict[str, dict[str, str]] = {}
    if what in (None, "recipes"):
        found["recipes"] = {name: recipe.load(name).description for name in recipe.shipped()}
    if what in (None, "criteria"):
        found["criteria"] = plan_stages.criteria()
    if what in (None, "families"):
        found["families"] = {
            name: ", ".join(a for a, m in families.ARCHITECTURES.items() if m == name)
            for name in families.family_names()
        }
    for title, entries in found.items():
        talk.table(title, ("name", ""), list(entries.items()))
    if talk.json or talk.quiet:
        talk.result(found, path="\n".join(name for entries in found.values() for name in entries))


@click.command()
@click.argument("name")
@click.option("--served-name", metavar="NAME", help="FOLDER: what clients ask for; the folder's name by default.")
@click.option("--context", type=click.IntRange(min=1), help="FOLDER: tokens; 32768 where the model has more.")
@click.option("--drafter", metavar="MODEL", help="FOLDER: a checkpoint that predicts more tokens.")
@click.option("--draft-tokens", type=click.IntRange(min=1), default=2, show_default=True, help="With --drafter.")
@click.option(
    "--images",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="FOLDER: in a request; 0 is text alone.",
)
@click.option("--cards", type=click.IntRange(min=1), default=1, show_default=True, help="FOLDER: GPUs that share it.")
@options.talk
def show(name: str, talk: Talk, **asked: Any) -> None:
    """Print a recipe, a criterion, the schema, or how an NVFP4 folder is served.

    NAME is a recipe, a criterion, schema, or FOLDER: the command that serves it, and what that needs.
    """
    from pathlib import Path

    from gemcut import plan_stages, recipe
    from gemcut.errors import UsageError

    known = ("schema", *recipe.shipped(), *plan_stages.criteria())
    if name not in known and Path(name).is_dir():
        _show_serving(name, asked, talk)
        return
    options.refuse(*asked, wanted="an NVFP4 folder")
    if name == "schema":
        schema = recipe.Recipe.model_json_schema(by_alias=True)
        if talk.json:
            talk.result(schema)
            return
        talk.table("Words of a recipe", ("path", "type", "default", "meaning"), recipe.words())
        return
    if name in recipe.shipped():
        talk.result({"name": name, "recipe": recipe.source(name)}, text=recipe.source(name).rstrip())
        return
    if name in plan_stages.criteria():
        text = plan_stages.criterion_text(name)
        talk.result({"name": name, "definition": text}, text=text)
        return
    raise UsageError(
        "there is nothing of that name",
        got=name,
        wanted="an NVFP4 folder, " + ", ".join(known),
        hint="gemcut list",
    )


def _show_serving(folder: str, asked: dict[str, Any], talk: Talk) -> None:
    from pathlib import Path

    from gemcut.checkpoint import open_checkpoint
    from gemcut.cli.nvfp4 import spoken
    from gemcut.nvfp4_stages import local_model
    from gemcut.serve import ServeWords, serving

    drafter, name = asked.pop("drafter"), asked.pop("served_name")
    words = ServeWords(model=folder, name=name or "", drafter=drafter and local_model(drafter), **asked)
    served = serving(open_checkpoint(Path(folder), any_architecture=True), words)
    talk.result(served, text=spoken(served))


@click.command()
@options.talk
def doctor(talk: Talk) -> None:
    """What this machine has: memory, disk, packages, devices, llama.cpp."""
    import os
    from pathlib import Path

    from gemcut import machine, shipped, stages, store
    from gemcut.errors import GemcutError
    from gemcut.ggml import library

    try:
        llama = library.load().identity
    except GemcutError as error:
        llama = "; ".join(str(part) for part in (error.what, error.hint) if part)
    try:
        shipped.demo_folder()
        demo = "there"
    except GemcutError as error:
        demo = error.what
    facts: dict[str, object] = {
        "cores": machine.cores(),
        "load_per_core": round(machine.load(), 2),
        "memory_gib": round(machine.total_bytes() / 2**30, 1),
        "memory_available_gib": round(machine.available_bytes() / 2**30, 1),
        "disk_free_gib": round(store.free_bytes(Path.cwd()) / 2**30, 1),
        "devices": stages.devices(),
        "demo_checkpoints": demo,
        "llama_cpp": llama,
        "llama_cpp_from": library.VARIABLE if os.environ.get(library.VARIABLE) else f"the wheel {library.PACKAGE}",
        "package_compressed_tensors": "absent; NVFP4 folders load with it: pip install 'gemcut[nvfp4]'",
        **{f"package_{name}": version for name, version in machine.stack().items()},
    }
    talk.table(
        "This machine", ("", ""), [(k, ", ".join(v) if isinstance(v, list) else str(v)) for k, v in facts.items()]
    )
    if machine.load() > 1.0:
        talk.say("the machine is loaded: timings will be slower than usual")
    if talk.json:
        talk.result(facts)
