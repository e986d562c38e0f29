"""What compression adds to a prefill: plain torch.compile against kvfx, per policy and prompt length.

    python benchmarks/prefill.py                    # all settings, 31 rounds: about an hour
    python benchmarks/prefill.py --models wide --name prefill_wide --policies knorm compactor
    python benchmarks/prefill.py --lengths 1024 --rounds 11 --policies knorm compactor
    python benchmarks/prefill.py --plot-only        # draws results/prefill.csv again

Both sides are Inductor with one thread; a policy that leaves a layer out stops the run. Writes results/prefill.csv, .md, .png and
.svg after each setting, so that a run that is cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import matplotlib
import torch
from matplotlib import pyplot
from method import AA, RATIO, Row, Subject, compare, number, read, save, table_of, text
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvfx

matplotlib.use("Agg")
MODELS = {
    "narrow": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "wide": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128},
}
SETTINGS = [("narrow", 1024), ("narrow", 4096), ("narrow", 8192), ("wide", 2048)]
GOALS = {"knorm": 1.01, "streaming_llm": 1.01, "keydiff": 1.01, "snapkv": 1.01, "expected_attention": 1.03, "compactor": 1.05}
SHORT = {"compactor": 1.08}  # at 1024 tokens, where attention is too cheap to hide a product of constant cost per token

# Arithmetic of scoring per token and layer, by the formulas of the ops: from query heads, KV heads, channels and prompt length.
ADDED_FLOPS: dict[str, Callable[[int, int, int, int], float]] = {
    "knorm": lambda heads, kv, dim, length: 2 * kv * dim,
    "streaming_llm": lambda heads, kv, dim, length: 0,
    "keydiff": lambda heads, kv, dim, length: 6 * kv * dim,
    "snapkv": lambda heads, kv, dim, length: 2 * heads * dim * 64,
    "tova": lambda heads, kv, dim, length: 2 * heads * dim,
    "lagkv": lambda heads, kv, dim, length: 12 * kv * dim,
    "chunkkv": lambda heads, kv, dim, length: 2 * heads * dim * 64,
    "criticalkv": lambda heads, kv, dim, length: 2 * heads * dim * 64 + 2 * heads * dim * heads * dim,
    "expected_attention": lambda heads, kv, dim, length: 4 * heads * dim * dim,
    "h2o_prefill": lambda heads, kv, dim, length: 2 * heads * dim * length,
    "compactor": lambda heads, kv, dim, length: 2 * heads * dim * 256 + kv * (2 * dim * 48 + 3 * 48 * 48),
}
POLICIES = [*ADDED_FLOPS]


def model_of(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **MODELS[name], num_hidden_layers=2, vocab_size=1024, max_position_embeddings=16384, attn_implementation="sdpa"
    )
    return LlamaForCausalLM(config).eval()


def plain_prefill(model: LlamaForCausalLM, ids: torch.Tensor) -> Callable[[], object]:
    """The same prefill without kvfx: one compiled forward that fills a DynamicCache."""
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True)

    @torch.no_grad()
    def run() -> object:
        return forward(input_ids=ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    return run


def flops(model: LlamaForCausalLM, length: int) -> float:
    """Of one prefill: projections, MLP and causal attention."""
    config = model.config
    linear = sum(p.numel() for name, p in model.model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = 2 * config.num_attention_heads * config.head_dim * length * config.num_hidden_layers  # half of QK and PV
    return 2.0 * linear * length + attention * length


def floor(model: LlamaForCausalLM, policy: str, length: int) -> float:
    """The ratio that the added arithmetic alone would give."""
    config = model.config
    per_token = ADDED_FLOPS[policy](config.num_attention_heads, config.num_key_value_heads, config.head_dim, length)
    return 1 + per_token * length * config.num_hidden_layers / flops(model, length)


def compressed_prefill(model: LlamaForCausalLM, policy: str, ids: torch.Tensor) -> Callable[[], object]:
    """The prefill under a policy at half the cache, after a check that no layer is left whole."""
    compiled = kvfx.compile(model, f"{policy}:0.5")
    compiled.compress(ids)
    explanation = kvfx.explain(compiled)
    if explanation.coverage != 1.0:
        raise SystemExit(f"{policy} leaves layers whole, so its time is not that of a compressed prefill:\n{explanation}")
    return functools.partial(compiled.compress, ids)


def measure(model_name: str, model: LlamaForCausalLM, length: int, options: argparse.Namespace) -> list[Row]:
    ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0))
    variants = {policy: compressed_prefill(model, policy, ids) for policy in options.policies}
    floors = {policy: floor(model, policy, length) for policy in options.policies if policy in ADDED_FLOPS}
    goals = GOALS | (SHORT if length <= 1024 else {})
    return compare(f"{model_name} S={length}", plain_prefill(model, ids), variants, floors, goals, options.rounds)


def table(name: str) -> str:
    about = [
        "Ratio of CPU time to plain `torch.compile`, median of paired runs with its 95 % interval. `floor`: what the added",
        "arithmetic alone would give. A goal is met, or not, when the ratio is further from it than the A/A interval reaches",
        "from 1; nearer is undecided.",
    ]
    columns = {
        "setting": text("setting"), "policy": text("variant"), **RATIO, "floor": number("floor", 3), "goal": number("goal", 3),
        "": text("verdict"), "s": number("seconds", 3), "plain s": number("baseline_seconds", 3), "pairs": number("rounds", 0),
    }  # fmt: skip
    return table_of(name, about, columns)


def plot(name: str) -> None:
    """Draw `results/NAME.csv`: one panel for each setting, one line for each policy."""
    where, rows = read(name)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    policies = list(dict.fromkeys(row["variant"] for row in rows if row["variant"] != AA))
    size = (3.2 * len(settings) + 1.2, 0.42 * len(policies) + 1.9)
    figure, panels = pyplot.subplots(1, len(settings), figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel, setting in zip(panels[0], settings, strict=True):
        noise = next(row for row in rows if row["setting"] == setting and row["variant"] == AA)
        panel.axvspan(noise["low"], noise["high"], color="0.85", label="plain against itself")
        panel.axvline(1, color="0.5", linewidth=0.8)
        for row in (row for row in rows if row["setting"] == setting and row["variant"] != AA):
            place = policies.index(row["variant"])
            panel.plot([row["low"], row["high"]], [place, place], color="tab:blue", linewidth=2)
            panel.plot(row["ratio"], place, "o", color="tab:blue", label="measured, 95 %")
            for key, mark, color in (("floor", "|", "black"), ("goal", "d", "tab:green")):
                if isinstance(row[key], float):
                    label = "added arithmetic alone" if key == "floor" else "goal"
                    panel.plot(row[key], place, mark, color=color, markersize=10 if key == "floor" else 5, label=label)
        panel.set_title(setting, fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(policies)), policies)
    panels[0][0].invert_yaxis()
    marks = {}
    for panel in panels[0]:
        handles, labels = panel.get_legend_handles_labels()
        marks |= dict(zip(labels, handles, strict=True))
    figure.legend(marks.values(), marks.keys(), loc="lower center", ncol=4, fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.06))
    figure.supxlabel("CPU time of the prefill / plain torch.compile", fontsize=9, y=0.03)
    figure.suptitle(f"Prefill that scores and evicts, Inductor\n{where}", fontsize=8)
    figure.tight_layout()
    save(figure, name)
    pyplot.close(figure)


SUBJECT = Subject("prefill", SETTINGS, measure, table, plot, model_of)

if __name__ == "__main__":
    PARSER = SUBJECT.parser(__doc__)
    PARSER.add_argument("--policies", nargs="+", default=POLICIES)
    SUBJECT.run(PARSER.parse_args())
