"""What there is: `list`, `show`, `doctor`."""

from __future__ import annotations

import click

from gemcut.cli import options
from gemcut.cli.console import Talk

KINDS = ("recipes", "criteria", "families")


@click.command("list")
@click.argument("what", type=click.Choice(KINDS), required=False)
@options.talk
def list_(what: str | None, talk: Talk) -> None:
    """What there is: recipes, criteria, families."""
    from gemcut import families, recipe, stages

    found: dict[str, dict[str, str]] = {}
    if what in (None, "recipes"):
        found["recipes"] = {name: recipe.load(name).description for name in recipe.shipped()}
    if what in (None, "criteria"):
        found["criteria"] = stages.criteria()
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
@options.talk
def show(name: str, talk: Talk) -> None:
    """Print a recipe, a criterion's definition, or the recipe schema."""
    from gemcut import recipe, stages
    from gemcut.errors import UsageError

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
    if name in stages.criteria():
        text = stages.criterion_text(name)
        talk.result({"name": name, "definition": text}, text=text)
        return
    raise UsageError(
        "there is nothing of that name",
        got=name,
        wanted="schema, " + ", ".join([*recipe.shipped(), *stages.criteria()]),
        hint="gemcut list",
    )


@click.command()
@options.talk
def doctor(talk: Talk) -> None:
    """What this machine has: memory, disk, packages, devices."""
    from pathlib import Path

    from gemcut import machine, shipped, stages, store
    from gemcut.errors import GemcutError

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
        **{f"package_{name}": version for name, version in machine.stack().items()},
    }
    talk.table(
        "This machine", ("", ""), [(k, ", ".join(v) if isinstance(v, list) else str(v)) for k, v in facts.items()]
    )
    if machine.load() > 1.0:
        talk.say("the machine is loaded: timings will be slower than usual")
    if talk.json:
        talk.result(facts)
