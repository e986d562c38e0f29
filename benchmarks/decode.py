"""What a decode step costs behind a long prompt: plain torch.compile against kvfx, per cache.

    python benchmarks/decode.py                     # all settings, 31 rounds: about eight minutes
    python benchmarks/decode.py --models narrow --lengths 4096 --rounds 11
    python benchmarks/decode.py --plot-only         # draws results/decode.csv again

All sides are Inductor with one thread. What is timed are a few steps in a row, each the model's forward on one token with what its
cache does about it; nothing of `generate`. Before each run the cache is put back, untimed. A graph that is compiled while it is
timed stops the run. Writes results/decode.csv, .md, .png and .svg after each setting.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from method import AA, Fresh, Row, Subject, compare, read, save
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import kvfx

matplotlib.use("Agg")
NARROW = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
MODELS: dict[str, dict[str, Any]] = {
    "narrow": {**NARROW, "dtype": torch.float32},
    "heads 32/8 x 128, bf16": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "dtype": torch.bfloat16},
}
SETTINGS = [("narrow", 4096), ("narrow", 8192), ("heads 32/8 x 128, bf16", 4096)]
STEPS = 8  # in a row: the first finds the caches of the processor full of something else, as no step of a real decode does


@dataclass(frozen=True)
class Prompt:
    """A model and what every cache has seen before the steps."""

    model: LlamaForCausalLM
    ids: Tensor

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.ids.shape[1]

    @property
    def capacity(self) -> int:
        """Slots of a cache that does not grow."""
        return self.length + STEPS


def steps(forward: Callable[..., Any], cache: Any) -> Callable[[], Tensor]:
    """Decode `STEPS` tokens behind `cache`; what it returns are the last one's logits."""
    token = torch.full((1, 1), 7)

    @torch.no_grad()
    def run() -> Tensor:
        for _ in range(STEPS):
            out = forward(input_ids=token, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits
        return logits

    return run


# -- rows: from a prompt to its steps ----------------------------------------------------------------------------------------------


def dynamic_cache(prompt: Prompt) -> Fresh:
    """torch.compile and a cache that grows by concatenation, in one graph for all lengths."""

    def forward(**inputs: Any) -> Any:  # of its own, because Dynamo keeps graphs by code object
        return prompt.model(**inputs)

    compiled, held = torch.compile(forward, fullgraph=True), DynamicCache(config=prompt.model.config)
    with torch.no_grad():
        prompt.model(input_ids=prompt.ids, past_key_values=held, logits_to_keep=1)
    layers = [(layer.keys.contiguous(), layer.values.contiguous()) for layer in held.layers]
    for tensor in (tensor for layer in layers for tensor in layer):
        torch._dynamo.mark_dynamic(tensor, 2)

    def prepare() -> Callable[[], Tensor]:
        for layer, tensors in zip(held.layers, layers, strict=True):
            layer.keys, layer.values = tensors
        return steps(compiled, held)

    return Fresh(prepare)


def static_cache(prompt: Prompt) -> Fresh:
    """torch.compile and transformers' preallocated cache, which is written in place by `index_copy_`."""

    def forward(**inputs: Any) -> Any:
        return prompt.model(**inputs)

    compiled, held = torch.compile(forward, fullgraph=True), StaticCache(prompt.model.config, prompt.capacity)
    with torch.no_grad():
        prompt.model(input_ids=prompt.ids, past_key_values=held, logits_to_keep=1)

    def prepare() -> Callable[[], Tensor]:
        for layer in held.layers:
            layer.cumulative_length.fill_(prompt.length)
        return steps(compiled, held)

    return Fresh(prepare)


def dense(keep: float) -> Callable[[Prompt], Fresh]:
    """A row of kvfx with its layout `dense`, which grows by concatenation."""

    def row(prompt: Prompt) -> Fresh:
        model = kvfx.compile(prompt.model, f"knorm:{keep}")
        held = model.compress(prompt.ids)
        return Fresh(lambda: steps(model, held.copy()))

    return row


def static(keep: float) -> Callable[[Prompt], Fresh]:
    """A row of kvfx with its layout `static`, which is written in place."""

    def row(prompt: Prompt) -> Fresh:
        model = kvfx.compile(prompt.model, f"knorm:{keep}")
        held = kvfx.StaticCache(int(prompt.length * keep) + STEPS, prompt.capacity)
        model.compress(prompt.ids, past_key_values=held)

        def prepare() -> Callable[[], Tensor]:
            held.crop(prompt.length - held.get_seq_length())
            return steps(model, held)

        return Fresh(prepare)

    return row


PLAIN = {"DynamicCache": dynamic_cache, "StaticCache": static_cache}
LAYOUTS = {"dense": dense, "static": static}
KVFX = {f"kvfx {layout}, keep {keep}": row(keep) for layout, row in LAYOUTS.items() for keep in (1.0, 0.5, 0.25)}
GOALS = {f"kvfx {layout}, keep {keep}": goal for layout in LAYOUTS for keep, goal in ((1.0, 0.90), (0.5, 0.60))}


def model_of(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(MODELS[name])
    dtype = shape.pop("dtype")
    config = LlamaConfig(
        **shape, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, vocab_size=1024, max_position_embeddings=16384,
        attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def measure(name: str, model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> list[Row]:
    """All rows against each plain one, and against kvfx's own static one that evicts nothing."""
    prompt = Prompt(model, torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0)))
    rows = {title: row(prompt) for title, row in (PLAIN | KVFX).items()}
    check_same(rows)
    built = counters["stats"]["unique_graphs"]
    goals = GOALS if name == "narrow" else {}
    measured = []
    for baseline, names in (
        ("DynamicCache", ["StaticCache", *KVFX]),
        ("StaticCache", [*KVFX]),
        ("kvfx static, keep 1.0", [title for title in KVFX if title != "kvfx static, keep 1.0"]),
    ):
        variants = {title: rows[title] for title in names}
        title = f"{name} S={length} / {baseline}"
        measured += compare(title, rows[baseline], variants, goals=goals if baseline in PLAIN else {}, rounds=options.rounds)
    if counters["stats"]["unique_graphs"] != built:
        raise SystemExit(f"{counters['stats']['unique_graphs'] - built} graphs were compiled while they were timed")
    return measured


def check_same(rows: dict[str, Fresh]) -> None:
    """Compile everything; whatever keeps all tokens gives the same logits."""
    logits = {title: [row() for _ in range(2)][1] for title, row in rows.items()}
    first, *others = (title for title in rows if title in PLAIN or "1.0" in title)
    for title in others:
        torch.testing.assert_close(
            logits[title], logits[first], rtol=0, atol=0.05 if logits[first].dtype == torch.bfloat16 else 1e-4
        )


def table(name: str) -> str:
    where, rows = read(name)
    lines = [
        f"Measured on {where}.\n",
        f"CPU time of {STEPS} decode steps behind S tokens, over that of the baseline behind the slash: median of pairs, with",
        "its 95 % interval. Plain rows are `torch.compile` of the transformers model. A goal is met, or not, when the ratio is",
        "further from it than the A/A interval reaches from 1; nearer is undecided.\n",
        "| setting / baseline | step | ratio | 95 % | goal | | ms a step | baseline ms | pairs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal = f"{row['goal']:.2f}" if isinstance(row["goal"], float) else ""
        times = " | ".join(f"{1000 * row[key] / STEPS:.2f}" for key in ("seconds", "baseline_seconds"))
        lines.append(
            f"| {row['setting']} | {row['variant']} | {row['ratio']:.3f} | {row['low']:.3f}-{row['high']:.3f} | {goal} "
            f"| {row['verdict']} | {times} | {row['rounds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(name: str) -> None:
    """Draw `results/NAME.csv`: one panel for each setting, one bar for each cache; the time of a step."""
    where, rows = read(name)
    settings = list(dict.fromkeys(row["setting"].split(" / ")[0] for row in rows))
    figure, panels = pyplot.subplots(1, len(settings), figsize=(3.2 * len(settings) + 1.2, 2.6), sharey=True, squeeze=False)
    for panel, setting in zip(panels[0], settings, strict=True):
        against = [row for row in rows if row["setting"] == f"{setting} / DynamicCache"]
        titles = ["DynamicCache" if row["variant"] == AA else row["variant"] for row in against]
        seconds = [1000 * (row["baseline_seconds"] if row["variant"] == AA else row["seconds"]) / STEPS for row in against]
        colors = ["tab:blue" if title.startswith("kvfx") else "0.6" for title in titles]
        panel.barh(range(len(titles)), seconds, color=colors)
        for place, (time, row) in enumerate(zip(seconds, against, strict=True)):
            panel.text(time, place, "" if row["variant"] == AA else f" {row['ratio']:.2f}x", va="center", fontsize=8)
        panel.set_title(setting, fontsize=10)
        panel.set_xlim(0, 1.2 * max(seconds))
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(titles)), titles)
    panels[0][0].invert_yaxis()
    figure.supxlabel("CPU time of one decode step, ms; beside it: over that with DynamicCache", fontsize=9)
    figure.suptitle(f"Decode behind a long prompt, Inductor\n{where}", fontsize=8)
    figure.tight_layout()
    save(figure, name)
    pyplot.close(figure)


SUBJECT = Subject("decode", SETTINGS, measure, table, plot, model_of)

if __name__ == "__main__":
    SUBJECT.run(SUBJECT.parser(__doc__).parse_args())
