"""What a decode step costs behind a long prompt: plain torch.compile against kvfx, per cache.

    python benchmarks/decode.py                     # all settings, 31 rounds: about twelve minutes
    python benchmarks/decode.py --layouts ragged --name decode_ragged
    python benchmarks/decode.py --models narrow --lengths 4096 --rounds 11
    python benchmarks/decode.py --plot-only         # draws results/decode.csv again

All sides are Inductor with one thread. What is timed are a few steps in a row, each the model's forward on one token with what its
cache does about it; nothing of `generate`. Before each run the cache is put back, untimed. A graph that is compiled while it is
timed stops the run. Writes results/decode.csv, .md, .png and .svg after each setting.

Bytes are those of all storages that a cache holds behind the steps, free slots, tables and positions included. Ragged caches that
evict do it by `budget=heads`, and the model's heads are made unlike each other, so that they hold very unequally many slots.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from method import AA, RATIO, Fresh, Row, Subject, bytes_column, compare, number, read, save, table_of, text, with_bytes
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
SPREAD = 0.08  # by which the keys of the first and the last head are longer and shorter than the mean
UNEQUAL = 1.5  # slots of the longest head over the mean, at least, where heads compete for half of all: else the row shows nothing


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


def steps(forward: Callable[..., Any], cache: Any) -> Callable[[], Any]:
    """Decode `STEPS` tokens behind `cache`; what it returns is the last step's output."""
    token = torch.full((1, 1), 7)

    @torch.no_grad()
    def run() -> Any:
        for _ in range(STEPS):
            out = forward(input_ids=token, past_key_values=cache, use_cache=True)
        return out

    return run


def bytes_of(cache: Any) -> int:
    """Bytes of all storages that a cache holds."""
    if isinstance(cache, kvfx.Cache):
        return cache.nbytes
    return sum(tensor.untyped_storage().nbytes() for layer in cache.layers for tensor in (layer.keys, layer.values))


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

    def prepare() -> Callable[[], Any]:
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

    def prepare() -> Callable[[], Any]:
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

        def prepare() -> Callable[[], Any]:
            held.crop(prompt.length - held.get_seq_length())
            return steps(model, held)

        return Fresh(prepare)

    return row


def ragged(keep: float) -> Callable[[Prompt], Fresh]:
    """A row of kvfx with its layout `ragged`, whose heads compete; where nothing is evicted, heads hold equally many."""

    def row(prompt: Prompt) -> Fresh:
        model = kvfx.compile(prompt.model, "knorm:1.0" if keep == 1.0 else f"knorm | budget=heads({keep})")
        held = kvfx.RaggedCache()
        model.compress(prompt.ids, past_key_values=held)
        lengths = torch.stack([layer.lengths for layer in held.ragged.values()]).double()
        if keep == 0.5 and (lengths.amax(2) < UNEQUAL * lengths.mean(2)).any():
            raise SystemExit(f"heads were to hold unequally many slots, and hold {lengths.long().tolist()}")

        def prepare() -> Callable[[], Any]:
            held.crop(prompt.length - held.get_seq_length())
            return steps(model, held)

        return Fresh(prepare)

    return row


PLAIN = {"DynamicCache": dynamic_cache, "StaticCache": static_cache}
LAYOUTS = {"dense": dense, "static": static, "ragged": ragged}
KEEPS = (1.0, 0.5, 0.25)
EQUAL = [f"kvfx {layout}, keep {keep}" for layout in ("dense", "static") for keep in KEEPS]
# What is promised of the narrow model, by baseline: of time, and of bytes.
GOALS = {
    baseline: {name: 0.90 if "1.0" in name else 0.60 for name in EQUAL if "0.25" not in name} for baseline in PLAIN
}  # fmt: skip
GOALS["DynamicCache"] |= {"kvfx ragged, keep 0.5": 0.70}
GOALS["kvfx ragged, keep 1.0"] = {"kvfx ragged, keep 0.5": 0.80}
BARS = {"DynamicCache": {"kvfx ragged, keep 0.5": 0.53}}


def model_of(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(MODELS[name])
    dtype = shape.pop("dtype")
    config = LlamaConfig(
        **shape, hidden_size=512, intermediate_size=1408, num_hidden_layers=2, vocab_size=1024, max_position_embeddings=16384,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    lengths = torch.linspace(1 + SPREAD, 1 - SPREAD, config.num_key_value_heads).repeat_interleave(config.head_dim)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(lengths[:, None])
    return model


def measure(name: str, model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> list[Row]:
    """All rows against each plain one; then those of a layout against its own that evicts nothing."""
    prompt = Prompt(model, torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0)))
    kvfx_rows = {f"kvfx {layout}, keep {keep}": LAYOUTS[layout](keep) for layout in options.layouts for keep in KEEPS}
    rows = {title: row(prompt) for title, row in (PLAIN | kvfx_rows).items()}
    held = check_same(rows)
    built = counters["stats"]["unique_graphs"]
    against: dict[str, Sequence[str]] = {"DynamicCache": ["StaticCache", *kvfx_rows], "StaticCache": [*kvfx_rows]}
    against["kvfx static, keep 1.0"] = [title for title in kvfx_rows if title in EQUAL]
    against["kvfx ragged, keep 1.0"] = [title for title in kvfx_rows if title not in EQUAL]
    measured: list[Row] = []
    for baseline in (baseline for baseline in against if baseline in rows):
        variants = {title: rows[title] for title in against[baseline] if title != baseline}
        goals = GOALS.get(baseline, {}) if name == "narrow" else {}
        title = f"{name} S={length} / {baseline}"
        compared = compare(title, rows[baseline], variants, goals=goals, rounds=options.rounds)
        measured += with_bytes(compared, baseline, held, BARS.get(baseline, {}))
    if counters["stats"]["unique_graphs"] != built:
        raise SystemExit(f"{counters['stats']['unique_graphs'] - built} graphs were compiled while they were timed")
    return measured


def check_same(rows: dict[str, Fresh]) -> dict[str, int]:
    """Compile everything; whatever keeps all tokens gives the same logits. Returns the bytes of each cache behind the steps."""
    logits, held = {}, {}
    for title, row in rows.items():
        row()
        out: Any = row()
        logits[title], held[title] = out.logits, bytes_of(out.past_key_values)
    first, *others = (title for title in rows if title in PLAIN or "1.0" in title)
    for title in others:
        torch.testing.assert_close(
            logits[title], logits[first], rtol=0, atol=0.05 if logits[first].dtype == torch.bfloat16 else 1e-4
        )
    return held


def table(name: str) -> str:
    about = [
        f"CPU time of {STEPS} decode steps behind S tokens, over that of the baseline behind the slash: median of pairs, with",
        "its 95 % interval. Plain rows are `torch.compile` of the transformers model. A goal is met, or not, when the ratio is",
        "further from it than the A/A interval reaches from 1; nearer is undecided. `bytes`: those of all that the cache holds,",
        "tables and free slots included, over the baseline's.",
    ]
    columns = {
        "setting / baseline": text("setting"), "step": text("variant"), **RATIO, "goal": number("goal", 2), "": text("verdict"),
        "bytes": bytes_column, "ms a step": number("seconds", 2, lambda row: 1000 / STEPS),
        "baseline ms": number("baseline_seconds", 2, lambda row: 1000 / STEPS), "pairs": number("rounds", 0),
    }  # fmt: skip
    return table_of(name, about, columns)


def plot(name: str) -> None:
    """Draw `results/NAME.csv`: one panel for each setting, one bar for each cache; the time of a step."""
    where, rows = read(name)
    settings = list(dict.fromkeys(row["setting"].split(" / ")[0] for row in rows))
    bars = max(sum(row["setting"] == f"{setting} / DynamicCache" for row in rows) for setting in settings)
    size = (3.2 * len(settings) + 1.2, 0.17 * bars + 1.25)
    figure, panels = pyplot.subplots(1, len(settings), figsize=size, sharey=True, squeeze=False)
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
    PARSER = SUBJECT.parser(__doc__)
    PARSER.add_argument("--layouts", nargs="+", default=[*LAYOUTS], choices=LAYOUTS)
    SUBJECT.run(PARSER.parse_args())
