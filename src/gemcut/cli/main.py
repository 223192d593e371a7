"""The lazy group: `gemcut --help` imports click and this file, nothing else."""

from __future__ import annotations

import importlib
import os
import sys

import click

from gemcut import __version__

# verb → (module:command, what the overview says). A test holds the texts against the commands' own help.
VERBS: dict[str, tuple[str, str]] = {
    "demo": ("gemcut.cli.run:demo", "The main job, end to end, on the checkpoint that ships with the project."),
    "inspect": ("gemcut.cli.checkpoints:inspect", "What a checkpoint is, its sizes, what can be cut. Headers only."),
    "observe": ("gemcut.cli.statistics:observe", "One streamed pass over a corpus; every statistic at once; resumes."),
    "merge": ("gemcut.cli.statistics:merge", "Add up observations of one model on different corpora."),
    "score": ("gemcut.cli.statistics:score", "Rank the experts by a criterion. Seconds, no model."),
    "plan": ("gemcut.cli.plans:plan", "Decide which units stay, and say why."),
    "ablate": ("gemcut.cli.heads:ablate", "What the loss says about every attention head, one layer in memory."),
    "heal": (
        "gemcut.cli.heads:heal",
        "Refit what a cut of heads or experts leaves, towards the original; resumes by layer.",
    ),
    "cut": ("gemcut.cli.checkpoints:cut", "Write the smaller checkpoint, its manifest and SHA256SUMS."),
    "verify": (
        "gemcut.cli.checkpoints:verify",
        "Hold the bytes of a cut checkpoint, or of two GGUF files, against plan and manifest.",
    ),
    "diff": (
        "gemcut.cli.checkpoints:diff",
        "Tensor by tensor between two checkpoints or two GGUF files, or drop by drop between two plans.",
    ),
    "imatrix": (
        "gemcut.cli.imatrix:imatrix",
        "Importance matrix that llama.cpp reads; from statistics without a second pass.",
    ),
    "curvature": (
        "gemcut.cli.curvature:curvature",
        "What a change of each weight does to the answers; gguf --size solves by it.",
    ),
    "gguf": (
        "gemcut.cli.gguf:gguf",
        "Write GGUF files straight from safetensors, many types from one read.",
    ),
    "nvfp4": ("gemcut.cli.nvfp4:nvfp4", "Write an NVFP4 checkpoint straight from safetensors."),
    "kld": ("gemcut.cli.measure:kld", "KL divergence of candidates from a base, streamed, no logits on disk."),
    "canary": (
        "gemcut.cli.canary:canary",
        "Does the model still talk? Greedy answers of base and candidate, held side by side.",
    ),
    "run": ("gemcut.cli.run:run", "Run a recipe: observe, plan, cut, verify, kld, report. Resumes."),
    "list": ("gemcut.cli.about:list_", "What there is: recipes, criteria, families."),
    "show": ("gemcut.cli.about:show", "Print a recipe, a criterion, the schema, or how an NVFP4 folder is served."),
    "doctor": ("gemcut.cli.about:doctor", "What this machine has: memory, disk, packages, devices, llama.cpp."),
}


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports one only when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module, _, attribute = VERBS[name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            guess = f" Did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"there is no verb '{args[0]}'.{guess} gemcut --help lists them.", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gemcut")
def gemcut() -> None:
    """Cut a large model down to the machine you have, and prove what it cost.

    Start with: gemcut demo
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point: one place turns failures into lines and exit codes."""
    try:
        status = gemcut.main(args=argv, standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("interrupted: finished work is kept; the same command goes on from there", err=True)
        sys.exit(130)
    except KeyboardInterrupt:
        click.echo("interrupted: finished work is kept; the same command goes on from there", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2 if isinstance(error, click.UsageError) else error.exit_code)
    except BrokenPipeError:
        # the reader of a pipe went away: not an error, but Python would complain again when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        from gemcut.cli import console
        from gemcut.errors import GemcutError

        if not isinstance(error, GemcutError):
            if isinstance(error, MemoryError):
                console.fail("out of memory: lower --max-memory or --max-tokens")
                sys.exit(3)
            raise
        if os.environ.get("GEMCUT_DEBUG"):
            raise
        console.fail(str(error))
        sys.exit(error.exit_code)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
