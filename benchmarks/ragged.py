"""Attention of one token to heads that hold unequally many slots: kvfx's form beside others, and beside attention to all of them.

    python benchmarks/ragged.py                     # all settings, 31 rounds: about half an hour
    python benchmarks/ragged.py --models narrow --lengths 4096 --rounds 11
    python benchmarks/ragged.py --plot-only         # draws results/ragged.csv again

All forms are Inductor with one thread: one graph of a few layers, whose queries wait for each other as those of a model do. The new
token's key and value are in place, or given beside the pool where the form takes them so; nothing is written, and no tables are made,
which `decode.py` has in its steps. Each answer is compared with its definition in float64 before anything is timed. Heads keep 10 % to
95 % of S tokens, half of all in the mean. Writes results/ragged.csv, .md, .png and .svg after each setting.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from method import AA, Row, Subject, bytes_column, compare, read, save, with_bytes
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kvfx.extents import CHUNK, Extents
from kvfx.kernels.attention import attention
from kvfx.kernels.ragged_attention import ragged_attention
from kvfx.pool import Pool

matplotlib.use("Agg")
LAYERS = 4
WORK = 2**27  # bytes of keys and values of all tokens that one timed run goes through, so that it takes milliseconds
FLEX_BLOCK = 128  # smaller ones took longer; the query's block must be 1
SHORTEST, LONGEST = 0.10, 0.95  # what a head keeps, of its tokens


@dataclass(frozen=True)
class Shape:
    """Rows, query heads, KV heads and channels of a layer."""

    rows: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    def repeats(self, length: int) -> int:
        """Steps that are timed together."""
        return max(1, WORK // (LAYERS * 2 * self.rows * self.kv_heads * self.dim * length * self.dtype.itemsize))


SHAPES = {
    "narrow": Shape(1, 8, 2, 64, torch.float32),
    "narrow, 4 rows": Shape(4, 8, 2, 64, torch.float32),
    "heads 32/8 x 128, bf16": Shape(1, 32, 8, 128, torch.bfloat16),
}
SETTINGS = [
    ("narrow", 4096), ("narrow", 8192), ("narrow, 4 rows", 4096), ("heads 32/8 x 128, bf16", 4096), ("heads 32/8 x 128, bf16", 8192),
]  # fmt: skip
PLAIN = "all tokens, sdpa"
FULL, HALF, FRAGMENTED = "kvfx, keep 1.0", "kvfx, keep 0.5", "kvfx, keep 0.5, fragmented"
GOALS = {PLAIN: {HALF: 0.70, FRAGMENTED: 0.70}, FULL: {HALF: 0.80, FRAGMENTED: 0.80}}
BARS = {PLAIN: {HALF: 0.53, FRAGMENTED: 0.53}}


class Problem:
    """Queries, keys and values of a few layers, and how many slots each head holds, the new token's among them.

    Attributes:
        queries: of each layer, [B, Hq, 1, D].
        keys: of each layer, [B, Hkv, S, D]; of those that a head does not keep the last ones are dropped.
        values: as `keys`.
    """

    def __init__(self, shape: Shape, length: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(heads: int, tokens: int) -> list[Tensor]:
            size = (shape.rows, heads, tokens, shape.dim)
            return [torch.randn(size, generator=generator).to(shape.dtype) for _ in range(LAYERS)]

        self.shape, self.length = shape, length
        self.queries, self.keys, self.values = draw(shape.heads, 1), draw(shape.kv_heads, length), draw(shape.kv_heads, length)
        self.full = np.full((LAYERS, shape.rows, shape.kv_heads), length)

    def drawn(self) -> np.ndarray:
        """Lengths that are half of `full` in the mean of each row of each layer, `[L, B, Hkv]`."""
        lengths = np.random.default_rng(0).uniform(SHORTEST, LONGEST, self.full.shape)
        for _ in range(100):
            lengths = np.clip(lengths + 0.5 - lengths.mean(2, keepdims=True), SHORTEST, LONGEST)
        lengths = (lengths * self.length).astype(np.int64)
        lengths[..., 0] += self.length * self.shape.kv_heads // 2 - lengths.sum(2)  # what rounding has lost
        return lengths

    def slots(self, states: Sequence[Tensor], layer: int, lengths: np.ndarray) -> Tensor:
        """Those of `keys` or `values` that heads hold, head behind head, [sum of lengths, D]."""
        held = states[layer].flatten(0, 1)
        return torch.cat([head[:length] for head, length in zip(held, lengths[layer].flatten().tolist(), strict=True)])


@dataclass(frozen=True)
class Form:
    """A way to attend.

    Attributes:
        step: compiled; what it returns are the outputs of all layers.
        lengths: slots of each head, `[L, B, Hkv]`.
        held: the tensors that hold them, and all tables.
    """

    step: Callable[[], list[Tensor]]
    lengths: np.ndarray
    held: Sequence[Tensor]

    @property
    def bytes(self) -> int:
        """Of the storages of `held`."""
        storages = [tensor.untyped_storage() for tensor in self.held]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def after(query: Tensor, outs: list[Tensor]) -> Tensor:
    """A layer's query, which needs what the layer before has given."""
    return query + outs[-1] if outs else query


def seen(lengths: Tensor, longest: int) -> Tensor:
    """Which slots heads hold, where all have room for as many, [B, Hkv, 1, T]."""
    return torch.arange(longest) < lengths[..., None, None]


def growing(states: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B, Hkv, T, D], T being no constant of a graph."""
    states = [state.contiguous() for state in states]
    for state in states:
        torch._dynamo.mark_dynamic(state, 2)
    return states


# -- forms: whole steps, for Dynamo keeps graphs by code object ---------------------------------------------------------------------


def plain_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value in zip(queries, keys, values, strict=True):
        outs.append(F.scaled_dot_product_attention(after(query, outs), key, value, enable_gqa=True))
    return outs


def dense_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value in zip(queries, keys, values, strict=True):
        outs.append(attention(after(query, outs), key, value, None, 0.0, False, None))
    return outs


def pool_step(
    queries: list[Tensor], news: list[Any], pool: Any, table: Tensor, lengths: Tensor, work: Any, shift: Tensor
) -> list[Tensor]:
    outs: list[Tensor] = []
    for layer, (query, (key, value)) in enumerate(zip(queries, news, strict=True)):
        places = table[layer], lengths[layer], *(part[layer] for part in work), shift
        outs.append(ragged_attention(after(query, outs), key, value, None, *pool, *places, CHUNK, None))
    return outs


def slices(flat: Tensor, starts: list[int], lengths: list[int]) -> list[Tensor]:
    """The slots of each head, of lengths that the graph reads from a tensor."""
    for start, length in zip(starts, lengths, strict=True):
        torch._check(start >= 0)
        torch._check(length >= 2)
        torch._check(start + length <= flat.shape[0])
    return [flat.narrow(0, start, length) for start, length in zip(starts, lengths, strict=True)]


def sliced_sdpa_step(queries: list[Tensor], layers: list[Any]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, (keys, values, first, held) in zip(queries, layers, strict=True):
        starts, lengths = first.tolist(), held.tolist()
        pairs = zip(slices(keys, starts, lengths), slices(values, starts, lengths), strict=True)
        asks = after(query, outs).view(len(lengths), 1, -1, query.shape[3])
        heads = [F.scaled_dot_product_attention(ask[None], key[None, None], value[None, None])
                 for ask, (key, value) in zip(asks.unbind(0), pairs, strict=True)]  # fmt: skip
        outs.append(torch.cat(heads).view(query.shape))
    return outs


def by_matmuls(asks: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    logits = (asks @ keys.mT).float() * asks.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).to(values.dtype) @ values


def sliced_matmul_step(queries: list[Tensor], layers: list[Any]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, (keys, values, first, held) in zip(queries, layers, strict=True):
        starts, lengths = first.tolist(), held.tolist()
        pairs = zip(slices(keys, starts, lengths), slices(values, starts, lengths), strict=True)
        asks = after(query, outs).view(len(lengths), -1, query.shape[3])
        heads = [by_matmuls(ask, key, value) for ask, (key, value) in zip(asks.unbind(0), pairs, strict=True)]
        outs.append(torch.cat(heads).view(query.shape))
    return outs


def padded_sdpa_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value, held in zip(queries, keys, values, lengths.unbind(0), strict=True):
        asks = after(query, outs).view(*key.shape[:2], -1, key.shape[3])
        mask = seen(held, key.shape[2]).expand(-1, -1, asks.shape[2], -1)
        outs.append(F.scaled_dot_product_attention(asks, key, value, mask).view(query.shape))
    return outs


def padded_matmul_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value, held in zip(queries, keys, values, lengths.unbind(0), strict=True):
        asks = after(query, outs).view(*key.shape[:2], -1, key.shape[3])
        outs.append(by_matmuls(asks, key, value, seen(held, key.shape[2])).view(query.shape))
    return outs


def flex_step(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], masks: list[BlockMask]) -> list[Tensor]:
    outs: list[Tensor] = []
    for query, key, value, mask in zip(queries, keys, values, masks, strict=True):
        asks = after(query, outs).view(1, -1, 1, query.shape[3])
        outs.append(flex_attention(asks, key, value, block_mask=mask, enable_gqa=True).view(query.shape))
    return outs


# -- their inputs -------------------------------------------------------------------------------------------------------------------


def compiled(step: Callable[..., list[Tensor]], *inputs: Any, dynamic: bool | None = None) -> Callable[[], list[Tensor]]:
    return functools.partial(torch.compile(step, fullgraph=True, dynamic=dynamic), *inputs)


def whole(problem: Problem, step: Callable[..., list[Tensor]], tokens: int) -> Form:
    """The first `tokens` of every head."""
    keys, values = (growing([state[:, :, :tokens] for state in states]) for states in (problem.keys, problem.values))
    lengths = np.full_like(problem.full, tokens)
    return Form(compiled(step, problem.queries, keys, values), lengths, [*keys, *values])


def in_pool(problem: Problem, lengths: np.ndarray, fragmented: bool) -> Form:
    """Slots in blocks of kvfx's pool: those of a head behind each other, or anywhere."""
    last = torch.from_numpy(lengths - 1)[..., None, None]
    news = [
        tuple(state.gather(2, last[layer].expand(-1, -1, 1, problem.shape.dim)) for state in (key, value))
        for layer, (key, value) in enumerate(zip(problem.keys, problem.values, strict=True))
    ]
    pool = Pool(problem.keys[0], problem.values[0])
    extents = Extents(pool, *lengths.shape)
    extents.fill(lengths - 1)
    if fragmented:
        order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(pool.blocks)]).astype(np.int32)
        extents.table = order[extents.table]
        extents.upload()
    for layer in range(LAYERS):
        slots = torch.from_numpy(extents.slots(layer))
        for held, states in ((pool.keys, problem.keys), (pool.values, problem.values)):
            held.flatten(0, 1)[slots] = problem.slots(states, layer, lengths - 1)
    shift = torch.zeros(problem.shape.rows, dtype=torch.int64)
    inputs = news, pool.tensors(), extents.device_table, extents.device_lengths, tuple(extents.work), shift
    step = compiled(pool_step, problem.queries, *inputs)
    held = [*pool.tensors(), *extents.tensors()]
    return Form(step, lengths, held)


def sliced(problem: Problem, lengths: np.ndarray, step: Callable[..., list[Tensor]]) -> Form:
    """Slots of a layer in one tensor, and a loop over its heads in the graph."""
    layers = []
    for layer in range(LAYERS):
        held = torch.from_numpy(lengths[layer].flatten())
        keys, values = (problem.slots(states, layer, lengths) for states in (problem.keys, problem.values))
        torch._dynamo.mark_dynamic(keys, 0)
        torch._dynamo.mark_dynamic(values, 0)
        layers.append((keys, values, held.cumsum(0) - held, held))
    return Form(compiled(step, problem.queries, layers), lengths, [tensor for layer in layers for tensor in layer])


def padded(problem: Problem, lengths: np.ndarray, step: Callable[..., list[Tensor]]) -> Form:
    """As many slots for every head as the longest needs."""
    held = torch.from_numpy(lengths)
    keys, values = (
        growing([
            state[:, :, : int(most.max())].masked_fill(~seen(most, int(most.max())).mT, 0)
            for state, most in zip(states, held, strict=True)
        ])
        for states in (problem.keys, problem.values)
    )  # fmt: skip
    return Form(compiled(step, problem.queries, keys, values, held), lengths, [*keys, *values, held])


def flexed(problem: Problem, lengths: np.ndarray) -> Form:
    """Slots of a layer in blocks of 128, which flex_attention takes for one KV head, and for each query head a list of blocks."""
    group, size = problem.shape.heads // problem.shape.kv_heads, FLEX_BLOCK
    keys, values, masks, tables = [], [], [], []
    for layer in range(LAYERS):
        held = lengths[layer].flatten()
        blocks = -(-held // size)
        starts = blocks.cumsum() - blocks
        slots = torch.cat(
            [start * size + torch.arange(length) for start, length in zip(starts.tolist(), held.tolist(), strict=True)]
        )
        for states, filled in ((problem.keys, keys), (problem.values, values)):
            pool = states[layer].new_zeros(int(blocks.sum()) * size, problem.shape.dim)
            pool[slots] = problem.slots(states, layer, lengths)
            filled.append(pool[None, None])
        masks.append(block_mask(held, starts, group, int(blocks.sum())))
        tables += [masks[-1].kv_indices, masks[-1].full_kv_indices, masks[-1].kv_num_blocks, masks[-1].full_kv_num_blocks]
    # Its form for a single query is for shapes that are constants.
    step = compiled(flex_step, problem.queries, keys, values, masks, dynamic=False)
    return Form(step, lengths, [*keys, *values, *tables])


def block_mask(held: np.ndarray, starts: np.ndarray, group: int, blocks: int) -> BlockMask:
    """Of each head the full blocks, and the last one, of which the end is hidden."""

    def rows(numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int32)).repeat_interleave(group, 0)[None, :, None].contiguous()

    full = (held - 1) // FLEX_BLOCK
    every = np.minimum(starts[:, None] + np.arange(blocks), blocks - 1)  # those behind `full` are not read
    last = np.broadcast_to((starts + full)[:, None], every.shape)
    ends = torch.from_numpy((held - 1) % FLEX_BLOCK).repeat_interleave(group)

    def there(row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return slot % FLEX_BLOCK <= ends[head]

    return BlockMask.from_kv_blocks(
        rows(np.ones_like(full)), rows(last), rows(full), rows(every), BLOCK_SIZE=(1, FLEX_BLOCK), mask_mod=there,
        seq_lengths=(1, blocks * FLEX_BLOCK), compute_q_blocks=False,
    )  # fmt: skip


def forms(problem: Problem) -> dict[str, Form]:
    """All of them by name."""
    drawn, length = problem.drawn(), problem.length
    return {
        PLAIN: whole(problem, plain_step, length),
        "all tokens, sdpa of groups": whole(problem, dense_step, length),
        FULL: in_pool(problem, problem.full, False),
        "equal heads, keep 0.5, sdpa of groups": whole(problem, dense_step, length // 2),
        HALF: in_pool(problem, drawn, False),
        FRAGMENTED: in_pool(problem, drawn, True),
        "sliced, keep 0.5, sdpa": sliced(problem, drawn, sliced_sdpa_step),
        "sliced, keep 0.5, matmuls": sliced(problem, drawn, sliced_matmul_step),
        "padded, keep 0.5, sdpa": padded(problem, drawn, padded_sdpa_step),
        "padded, keep 0.5, matmuls": padded(problem, drawn, padded_matmul_step),
        "flex_attention, keep 0.5": flexed(problem, drawn),
    }


# -- what is right ------------------------------------------------------------------------------------------------------------------


def definition(problem: Problem, layer: int, query: Tensor, lengths: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Attention of each head to the slots that it holds, as it is defined, in `dtype`."""
    shape = problem.shape
    asks = query.to(dtype).view(shape.rows, shape.kv_heads, -1, shape.dim)
    logits = asks @ problem.keys[layer].to(dtype).mT * shape.dim**-0.5
    logits = logits.masked_fill(~seen(torch.from_numpy(lengths[layer]), problem.length), -torch.inf)
    return (logits.softmax(-1) @ problem.values[layer].to(dtype)).view(query.shape)


def check(title: str, problem: Problem, form: Form) -> None:
    """Stop if a form is further from the definition in float64 than four times what the definition in its own dtype is."""
    outs = form.step()
    for layer, out in enumerate(outs):
        query = after(problem.queries[layer], outs[:layer])
        exact, plain = (definition(problem, layer, query, form.lengths, dtype) for dtype in (torch.float64, query.dtype))
        error, rounding = (float((result.double() - exact).abs().max()) for result in (out, plain))
        allowed = 4 * rounding + 16 * torch.finfo(torch.float32).eps * float(exact.abs().max())
        if not error <= allowed:
            raise SystemExit(f"{title}, layer {layer}: error {error:.2e}, rounding explains {allowed:.2e}")


# -- what is measured ---------------------------------------------------------------------------------------------------------------


def measure(name: str, shape: Shape, length: int, options: argparse.Namespace) -> list[Row]:
    """All forms against plain attention to all tokens, and kvfx's against its own that holds all tokens."""
    torch.compiler.reset()
    torch._dynamo.config.capture_scalar_outputs = True  # the forms that slice read lengths from tensors
    torch.manual_seed(0)
    with torch.no_grad():
        problem = Problem(shape, length)
        ways = forms(problem)
        for title, form in ways.items():
            check(title, problem, form)
        runs = {title: functools.partial(repeat, form.step, shape.repeats(length)) for title, form in ways.items()}
        floors = {title: float(form.lengths.mean()) / length for title, form in ways.items()}
        held = {title: form.bytes for title, form in ways.items()}
        measured: list[Row] = []
        for baseline, titles in ((PLAIN, [*ways]), (FULL, [HALF, FRAGMENTED])):
            variants = {title: runs[title] for title in titles if title != baseline}
            title, goals = f"{name} S={length} / {baseline}", GOALS[baseline]
            rows = compare(title, runs[baseline], variants, floors, goals, options.rounds)
            measured += with_bytes(rows, baseline, held, BARS.get(baseline, {}))
    return measured


def repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def calls(row: dict[str, Any]) -> int:
    """How often a run of a row attends, counted by layers."""
    name, length = row["setting"].split(" / ")[0].rsplit(" S=", 1)
    return LAYERS * SHAPES[name].repeats(int(length))


def table(name: str) -> str:
    where, rows = read(name)
    lines = [
        f"Measured on {where}.\n",
        "CPU time of attention of one token, over that of the baseline behind the slash: median of pairs, with its 95 % interval.",
        "`floor`: bytes of the keys and values of the slots held, over those of all. `bytes`: those of all tensors that hold them,",
        "tables and free slots included, over the baseline's. A goal is met, or not, when the ratio is further from it than the A/A",
        "interval reaches from 1; nearer is undecided.\n",
        "| setting / baseline | form | ratio | 95 % | floor | goal | | bytes | us a layer | baseline us | pairs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bounds = " | ".join(f"{row[key]:.2f}" if isinstance(row[key], float) else "" for key in ("floor", "goal"))
        times = " | ".join(f"{1e6 * row[key] / calls(row):.0f}" for key in ("seconds", "baseline_seconds"))
        lines.append(
            f"| {row['setting']} | {row['variant']} | {row['ratio']:.3f} | {row['low']:.3f}-{row['high']:.3f} | {bounds} "
            f"| {row['verdict']} | {bytes_column(row)} | {times} | {row['rounds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(name: str) -> None:
    """Draw `results/NAME.csv`: one panel for each setting, one bar for each form; time over that of plain attention."""
    where, rows = read(name)
    settings = list(dict.fromkeys(row["setting"].split(" / ")[0] for row in rows))
    against = {setting: [row for row in rows if row["setting"] == f"{setting} / {PLAIN}"] for setting in settings}
    size = (2.6 * len(settings) + 2.2, 0.2 * max(map(len, against.values())) + 1.25)
    figure, panels = pyplot.subplots(1, len(settings), figsize=size, sharey=True, squeeze=False)
    for panel, setting in zip(panels[0], settings, strict=True):
        titles = [PLAIN if row["variant"] == AA else row["variant"] for row in against[setting]]
        ratios = [row["ratio"] for row in against[setting]]
        panel.barh(range(len(titles)), ratios, color=["tab:blue" if title.startswith("kvfx") else "0.6" for title in titles])
        for place, row in enumerate(against[setting]):
            panel.text(row["ratio"], place, f" {row['ratio']:.2f}", va="center", fontsize=8)
            if isinstance(row["floor"], float):
                panel.plot(row["floor"], place, "|", color="black", markersize=8)
        panel.axvline(1, color="0.5", linewidth=0.8)
        panel.set_title(setting, fontsize=9)
        panel.set_xlim(0, 1.2 * max(1, *ratios))
        panel.grid(axis="x", alpha=0.3)
        panel.set_yticks(range(len(titles)), titles)
    panels[0][0].invert_yaxis()
    figure.supxlabel(f"CPU time / that of {PLAIN}; mark: bytes of the slots held / of all", fontsize=9)
    figure.suptitle(f"Attention of one token to heads of unequal length, Inductor\n{where}", fontsize=8)
    figure.tight_layout()
    save(figure, name)
    pyplot.close(figure)


SUBJECT = Subject("ragged", SETTINGS, measure, table, plot, SHAPES.__getitem__)

if __name__ == "__main__":
    SUBJECT.run(SUBJECT.parser(__doc__).parse_args())
