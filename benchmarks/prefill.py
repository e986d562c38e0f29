"""What compression adds to a prefill: plain torch.compile against kvfx, per policy and prompt length.

    python benchmarks/prefill.py                    # all settings, 31 rounds: about an hour
    python benchmarks/prefill.py --lengths 1024 --rounds 11 --policies knorm compactor

Both sides are Inductor with one thread; no layer is left out by a policy. Writes results/prefill.csv and results/prefill.md.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Callable

import torch
from method import RESULTS, Row, compare, machine, write
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvfx

MODELS = {
    "narrow": {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "wide": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128},
}
SETTINGS = [("narrow", 1024), ("narrow", 4096), ("narrow", 8192), ("wide", 2048)]
POLICIES = ["knorm", "compactor"]


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


def added_flops(model: LlamaForCausalLM, policy: str, length: int) -> float:
    """Of scoring, by the formulas of the ops."""
    config = model.config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    per_token = {
        "knorm": 2 * kv_heads * dim,
        "compactor": 2 * heads * dim * 256 + kv_heads * (2 * dim * 48 + 3 * 48 * 48),
        "expected_attention": 4 * heads * dim * dim,
    }
    return float(per_token.get(policy, 0) * length * config.num_hidden_layers)


def table(rows: list[Row]) -> str:
    lines = [
        f"Measured on {machine()}.\n",
        "Ratio of CPU time to plain `torch.compile`, median of paired runs with its 95 % interval. `floor`: what the added",
        "arithmetic alone would give. A difference inside the A/A interval is noise.\n",
        "| setting | policy | ratio | 95 % | floor | s | plain s | pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        floor = f"{row.floor:.3f}" if isinstance(row.floor, float) else ""
        lines.append(
            f"| {row.setting} | {row.variant} | {row.ratio:.3f} | {row.low:.3f}-{row.high:.3f} | {floor} | {row.seconds:.3f} "
            f"| {row.baseline_seconds:.3f} | {row.rounds} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--name", default="prefill", help="of the result files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in options.models:
        model = model_of(name)
        for length in (length for setting, length in SETTINGS if setting == name):
            if options.lengths and length not in options.lengths:
                continue
            ids = torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0))
            variants, floors = {}, {}
            for policy in options.policies:
                compiled = kvfx.compile(model, f"{policy}:0.5")
                variants[policy] = functools.partial(compiled.compress, ids)
                floors[policy] = 1 + added_flops(model, policy, length) / flops(model, length)
            rows += compare(
                f"{name} S={length}", plain_prefill(model, ids), variants, floors, options.rounds,
                lambda row: print(f"{row.setting:16} {row.variant:18} {row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}]", flush=True),
            )  # fmt: skip
            write(options.name, rows, "python " + shlex.join(sys.argv))
            (RESULTS / f"{options.name}.md").write_text(table(rows))


if __name__ == "__main__":
    main()
