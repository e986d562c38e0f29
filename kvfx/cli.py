"""The command line: `kvfx demo`, `kvfx explain`, `kvfx policies`, `kvfx export` and `kvfx run`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvfx import api, trial
from kvfx.algebra import Atom
from kvfx.demo import checkpoint, figure, pictures, run, sweep
from kvfx.errors import InputError, KvfxError, unknown_name
from kvfx.exporting import export
from kvfx.lower import lower
from kvfx.packaged import load
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
    backend: Annotated[
        str | None,
        typer.Option(help="What runs the graphs: inductor, aot_eager or eager.", show_default="inductor; eager with --all"),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every preset, or --policy, at keeps 1, 0.5, 0.25, 0.1 and 0.05: about 5 minutes.")
    ] = False,
    questions: Annotated[int, typer.Option(min=1, help="Questions to ask of the packaged model, of each document.")] = 40,
    model: Folder = None,
    context: File = None,
    question: Annotated[list[str] | None, typer.Option(help="A question on the context; may be repeated.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="A policy to compare; may be repeated.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer, with --model.")] = 64,
    device: Annotated[str, typer.Option(help="Where the model runs, with --model.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results here, too.")] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Draw pictures into this folder.", show_default="kvfx-demo with --all")
    ] = None,
) -> None:
    """Compress a cache before the questions are known, and see what is still answered.

    Without --model, a small packaged model reads a document of notes. With it, your model reads your text.
    """
    console = Console()
    out = out or (Path("kvfx-demo") if every else None)
    with _clean_errors():
        if out is not None:
            figure.check()
        if model is not None:
            if context is None or not question:
                raise InputError("--model needs --context FILE and at least one --question TEXT")
            if every:
                raise InputError("--all is for the packaged model; with --model, name the policies, --policy compactor:0.25")
            text = context.read_text(encoding="utf-8")
            result: Any = checkpoint.compare(
                model,
                text,
                question,
                policy or ["compactor:0.5"],
                backend=backend or "inductor",
                new_tokens=new_tokens,
                device=device,
                console=console,
            )
        elif context or question:
            raise InputError("--context and --question are for your own checkpoint: add --model DIR")
        elif every:
            result = sweep.sweep(backend or "eager", questions, names=policy, console=console)
        else:
            result = run.run(backend or "inductor", questions, policies=policy or run.POLICIES, console=console)
        console.print(result)
        if json_file is not None:
            json_file.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
        for file in () if out is None else pictures.draw(result, out):
            console.print(f"drawn: {file}", highlight=False, soft_wrap=True)


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


@main.command("export")
def export_package(
    model_dir: Annotated[Path, typer.Argument(help="Folder of a transformers checkpoint.", exists=True, file_okay=False)],
    package: Annotated[Path, typer.Argument(help="Folder to make; nothing may stand there.")],
    policy: Annotated[str, typer.Option(help="What to keep.")] = "compactor:0.5",
    max_prompt: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 1024,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that may follow a prompt, asked or generated.")] = 256,
    batch: Annotated[int, typer.Option(help="Rows of every call.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of the weights, such as float32 or bfloat16; auto is that of the checkpoint.")
    ] = "auto",
) -> None:
    """Compile a checkpoint with a policy into a package that runs without transformers, and without Python."""
    console = Console()
    with _clean_errors():
        model = _checkpoint(model_dir, dtype)
        numbers = {"max_prompt": max_prompt, "max_new_tokens": max_new_tokens, "batch": batch}
        with console.status("Compiling prefill, extend and decode, which takes minutes ..."):
            export(model, package, policy, tokenizer=model_dir, **numbers)  # type: ignore[arg-type]
        held = sum(file.stat().st_size for file in package.iterdir())
        console.print(f"{package}: {type(model).__name__} under {escape(policy)}, {held / 2**20:.1f} MiB")


@main.command("run")
def run_package(
    package: Annotated[Path, typer.Argument(help="Folder that `kvfx export` made.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - is standard input.")] = "-",
    new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate; the default is what there is room for.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; more draws.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among so many tokens; 0 means all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the fewest tokens that are so likely together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of what draws.")] = None,
) -> None:
    """Continue a text with a package."""
    with _clean_errors():
        model = load(package)
        text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
        ids = torch.tensor([model.tokenizer.encode(text).ids], dtype=torch.long)
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        said, shown = list[int](), ""
        for token in model.stream(ids, max_new_tokens=new_tokens, **settings):  # type: ignore[arg-type]
            said.append(int(token))
            whole = model.tokenizer.decode(said)
            if not whole.endswith("\ufffd"):  # half of a character
                typer.echo(whole[len(shown) :], nl=False)
                shown = whole
        typer.echo()


def _atoms(name: str) -> list[Atom]:
    """The score atoms of a preset, each once."""
    return list(dict.fromkeys(Policy.parse(name).atoms()))


def _reads(name: str) -> str:
    return ", ".join(lower(Policy.parse(name)).taps) or "-"


def _cost(name: str) -> str:
    return "; ".join(f"{atom.name}: {atom.row.cost}" for atom in _atoms(name)) or "-"


def _checkpoint(folder: Path, dtype: str) -> Any:
    """The decoder in a folder, in eval mode."""
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load a causal decoder from {folder}: {error}") from error


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Show an error of ours as one message without a traceback, and exit with 1."""
    try:
        yield
    except KvfxError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}:[/] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None
