"""The model card: README.md with front matter, in the order that readers know. Numbers only from the data."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jinja2
import yaml

from gemcut.report import parts, tables
from gemcut.report.data import Drawing, ReportData, Table
from gemcut.report.quants import Quants, worth
from gemcut.report.spelling import change, count, interval, parameters, signed, size
from gemcut.report.text import Markdown, code_block, code_span, escape_markdown, plain
from gemcut.types import Estimate, Json


def front_matter(data: ReportData) -> dict[str, Json]:
    """What the hub reads: base model, library, tags, and the base's licence where the base states one."""
    matter: dict[str, Json] = {}
    if data.base.licence is not None:
        matter["license"] = plain(data.base.licence)
    if data.base.hub_id is not None:
        matter["base_model"] = plain(data.base.hub_id)
        matter["base_model_relation"] = "finetune"
        if data.only_quants or data.only_nvfp4:
            matter["base_model_relation"] = "quantized"
    matter["library_name"] = "gguf" if data.only_quants else "transformers"
    if data.base.pipeline_tag is not None:
        matter["pipeline_tag"] = plain(data.base.pipeline_tag)
    tags: list[Json] = ["gemcut"]
    if data.plan is not None:
        tags += ["pruned", "expert-pruning" if data.kind == "experts" else "head-pruning"]
    if data.base.top_k:
        tags.append("moe")
    if data.quants is not None:
        tags += ["gguf", "quantized"]
        tags += ["imatrix"] if any(one.imatrix for one in data.quants.files) else []
    if data.only_nvfp4 and data.nvfp4 is not None:
        tags += ["nvfp4", data.nvfp4.layout, "vllm", "quantized"]
    matter["tags"] = tags
    return matter


def comparison(data: ReportData) -> Table:
    """Base and this model side by side. Exact quantities have no interval; measured ones have it, and n."""
    base, cut = data.base, data.candidate
    rows = [
        ("Size on disk", size(base.size_bytes), size(cut.size_bytes), change(base.size_bytes, cut.size_bytes)),
        (
            "Parameters",
            parameters(base.parameters),
            parameters(cut.parameters),
            change(base.parameters, cut.parameters),
        ),
    ]
    if base.active_parameters is not None and cut.active_parameters is not None:
        a, b = base.active_parameters, cut.active_parameters
        rows.append(("Active parameters per token", parameters(a), parameters(b), change(a, b)))
    if base.units is not None and cut.units is not None:
        name = tables.units_name(data).capitalize()
        delta = signed(cut.units - base.units, 0)
        rows.append((f"{name} per layer", str(base.units), str(cut.units), delta))
    if base.top_k is not None and cut.top_k is not None:
        rows.append(("Experts per token", str(base.top_k), str(cut.top_k), signed(cut.top_k - base.top_k, 0)))
    row = data.entry.row() if data.entry else None
    if row is not None:
        n = f"n = {count(row.mean.n)} chunks"
        floor = data.noise_floor.row() if data.noise_floor else None
        own = interval(floor.mean) if floor else "0 by definition"
        kld, p99, ppl = (interval(value, sign=True) for value in (row.mean, row.p99, row.ln_ppl_ratio))
        rows += [
            (f"Mean KLD from the base, nats per token ({n})", own, interval(row.mean), kld),
            (f"99th percentile of the KLD, nats ({n})", "0 by definition", interval(row.p99), p99),
            (f"ln PPL ratio ({n})", "0 by definition", ppl, ppl),
            (
                f"Same most likely token, % ({n})",
                "100 by definition",
                interval(row.same_top, scale=100),
                _less(row.same_top),
            ),
        ]
    return Table(("", "Base", "This model", "Δ"), tuple(rows), "lrrr")


def _less(share: Estimate) -> str:
    """The share's distance from 1, in percentage points with its interval."""
    return interval(Estimate(share.value - 1, share.low - 1, share.high - 1, share.n), scale=100, sign=True) + " pp"


def markdown_table(table: Table, code: Sequence[int] = ()) -> Markdown:
    """A GitHub table; `code` names the columns that are code spans; the chosen row is bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    marks = ["---:" if letter == "r" else ":---" for letter in table.align]
    lines = [line([escape_markdown(name) or " " for name in table.columns]), line(marks)]
    for i, row in enumerate(table.rows):
        cells: list[str] = [code_span(cell) if c in code else escape_markdown(cell) for c, cell in enumerate(row)]
        lines.append(line([f"**{cell}**" if i == table.chosen and cell else cell for cell in cells]))
    return Markdown("\n".join(lines))


def snippet(data: ReportData) -> str:
    """Python that loads the folder and answers one question: with stock transformers, or what NVFP4 experts need.

    Empty where neither reads the layout.
    """
    folder = plain(data.candidate.name)
    if data.only_nvfp4 and data.nvfp4 is not None:
        return _asked(_LOAD.format(json.dumps(folder, ensure_ascii=False))) if data.nvfp4.loads else ""
    auto = data.candidate.auto_class if data.candidate.auto_class.isidentifier() else "AutoModelForCausalLM"
    names = ", ".join(sorted(("AutoTokenizer", auto)))
    return _asked(f"""from transformers import {names}

folder = {json.dumps(folder, ensure_ascii=False)}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = {auto}.from_pretrained(folder, dtype="auto")
""")


_LOAD = """import gemcut
from transformers import AutoTokenizer

folder = {}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = gemcut.load(folder)
"""


def _asked(loaded: str) -> str:
    """A question behind the lines that load a model."""
    return f"""{loaded}
messages = [{{"role": "user", "content": "Explain what an expert of a mixture is."}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""


def serve(quants: Quants) -> str:
    """llama-server with one file of the front, and with what lies beside it."""
    models = quants.models
    if not models:
        return "\n".join(plain(one.name) for one in quants.files)
    words = [f"llama-server -m {plain(worth(quants).name)} --jinja -c 8192"]
    projector, drafter = quants.beside("mmproj"), quants.beside("drafter")
    if projector is not None:
        words.append(f"--mmproj {plain(projector.name)}")
    if drafter is not None:
        words.append(f"--model-draft {plain(drafter.name)} --spec-type draft-mtp --spec-draft-n-max 4")
    return " \\\n    ".join(words)


def render_card(data: ReportData, drawings: Sequence[Drawing] = (), figures: str | None = None) -> str:
    """README.md as text. `figures`: folder of the SVG files, relative to the card; None leaves the pictures out."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gemcut.report"),
        autoescape=False,  # Markdown: every printed value goes through escape_markdown instead
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=escape_markdown,
    )
    pictures = {
        d.name: Markdown(f"![{escape_markdown(d.caption)}]({figures}/{d.name}.svg)") for d in drawings if figures
    }
    environment.globals.update(table=markdown_table, code_span=code_span, code_block=code_block)
    return environment.get_template("quants-card.md.j2" if data.only_quants else "card.md.j2").render(
        **parts.shared(data),
        matter=Markdown(yaml.safe_dump(front_matter(data), sort_keys=False, allow_unicode=True).rstrip("\n")),
        comparison=comparison(data),
        pictures=pictures,
        snippet=snippet(data),
        serve=serve(data.quants) if data.quants is not None else "",
    )
