"""The command line: `kvfx demo`, `kvfx explain` and `kvfx policies`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvfx import api, trial
from kvfx.algebra import Atom
from kvfx.demo import checkpoint, run
from kvfx.errors import InputError, KvfxError, unknown_name
from kvfx.lower import lower
from kvfx.policy import Policy, as_policy
from kvfx.presets import PRESETS

main = typer.Typer(name="kvfx", no_args_is_help=True, add_completion=False, rich_markup_mode="rich")

File = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Text file: what is compressed.")]
Folder = Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Folder of a transformers checkpoint.")]


@main.callback()
def about() -> None:
    """KV-cache compression as a graph pass for torch.compile."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@main.command()
def demo(
    backend: Annotated[str, typer.Option(help="What runs the graphs: inductor, aot_eager or eager.")] = "inductor",
    questions: Annotated[int, typer.Option(min=1, help="Questions to ask of the packaged model.")] = 40,
    model: Folder = None,
    context: File = None,
    question: Annotated[list[str] | None, typer.Option(help="A question on the context; may be repeated.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="A policy to compare; may be repeated.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer, with --model.")] = 64,
    device: Annotated[str, typer.Option(help="Where the model runs, with --model.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
) -> None:
    """Compress a cache before the questions are known, and see what is still answered.

    Without --model, a small packaged model reads a document of notes. With it, your model reads your text.
    """
    console = Console()
    with _clean_errors():
        if model is not None:
            if context is None or not question:
                raise InputError("--model needs --context FILE and at least one --question TEXT")
            text = context.read_text(encoding="utf-8")
            policies = policy or ["compactor:0.5"]
            result: Any = checkpoint.compare(
                model, text, question, policies, backend=backend, new_tokens=new_tokens, device=device, console=console
            )
        elif context or question:
            raise InputError("--context and --question are for your own checkpoint: add --model DIR")
        else:
            result = run.run(backend, questions, policies=policy or run.POLICIES, console=console)
        console.print(result)
        if json_file is not None:
            json_file.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")


@main.command()
def explain(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a transformers checkpoint; its config.json is enough.")],
    policy: Annotated[list[str] | None, typer.Option(help="A policy to explain; may be repeated.")] = None,
    attention: Annotated[str | None, typer.Option(help="Attention of transformers, such as sdpa or eager.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here, too; - is standard output.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if anything is left alone.")] = False,
) -> None:
    """Say what a policy would do to a model: every attention site, how it is found and scored, or why it is left alone.

    Only config.json is read: the model is traced on the meta device, without weights, so any size is explained in little memory.

    Exits with 0, also if something is left alone; with 1 after an error; with 3 see --strict.
    """
    to_stdout = json_file is not None and str(json_file) == "-"
    console = Console(stderr=to_stdout)
    with _clean_errors():
        chosen = [as_policy(text) for text in policy or ["compactor:0.5"]]
        model = trial.outline(model_dir, attention)
        explanations = []
        for each in chosen:
            explanations.append(replace(api.explain(model, policy=each), remark=trial.OUTLINE))
            console.print(explanations[-1])
        if json_file is not None:
            text = json.dumps([explanation.as_dict() for explanation in explanations], indent=2) + "\n"
            typer.echo(text, nl=False) if to_stdout else json_file.write_text(text, encoding="utf-8")
    if strict and any(not explanation.is_complete for explanation in explanations):
        raise typer.Exit(3)


@main.command()
def policies(name: Annotated[str | None, typer.Argument(help="A preset, to see its scores and numbers.")] = None) -> None:
    """List the presets, or show one: its text, what its scores read and cost, its numbers and where they come from."""
    console = Console()
    if name is None:
        table = Table("preset", "policy", "reads", "cost per token, layer and KV head", "source", show_lines=True)
        for key, preset in PRESETS.items():
            table.add_row(key, escape(preset.text), _reads(key), escape(_cost(key)), escape(preset.paper))
        console.print(table)
        return
    with _clean_errors():
        if name not in PRESETS:
            raise unknown_name("preset", name, PRESETS)
    preset = PRESETS[name]
    console.print(f"[bold]{name}[/]: {escape(preset.summary)}\n{escape(preset.paper)}\n\n{escape(preset.text)}\n")
    scores = Table("score", "what it favours", "reads", "cost per token, layer and KV head", "source", show_lines=True)
    for atom in _atoms(name):
        reads = ", ".join(atom.row.lower(dict(atom.values), Fraction(1, 2)).taps)
        scores.add_row(atom.name, escape(atom.row.summary), reads, escape(atom.row.cost), escape(atom.row.source))
    numbers = Table("number", "default", "source")
    for key, source in preset.sources.items():
        numbers.add_row(escape(key), preset.params.get(key, "-"), escape(source))
    for rows in (scores, numbers):
        if rows.row_count:
            console.print(rows)


def _atoms(name: str) -> list[Atom]:
    """The score atoms of a preset, each once."""
    return list(dict.fromkeys(Policy.parse(name).atoms()))


def _reads(name: str) -> str:
    return ", ".join(lower(Policy.parse(name)).taps) or "-"


def _cost(name: str) -> str:
    return "; ".join(f"{atom.name}: {atom.row.cost}" for atom in _atoms(name)) or "-"


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Show an error of ours as one message without a traceback, and exit with 1."""
    try:
        yield
    except KvfxError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
