"""One row of the zoo with its models and graphs, and what is checked of it; each check ends in a cell of docs/models.md."""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from torch import Tensor, fx

import kvfx
import kvfx.passes as passes
import reference
import zoo
import zoo_reference
from graphs import computed
from kvfx.explanation import Explanation
from kvfx.kernels.leverage import draw_sketch
from kvfx.passes.attach_cache import attach_cache
from kvfx.passes.find_attention import find_attention
from kvfx.passes.plan import OpCall, Plan
from kvfx.passes.report import Report
from yardstick import assert_within_rounding

LENGTH, SHORT = 40, 29  # of the prompts; longer than a window, and twice what is protected is less than either
PROTECTED = {"knorm": (0, 0), "compactor": (8, 4)}
REAL_RUN = passes.run
TAPS = ("query", "key", "value", "pre_query", "pre_key")


class Family:
    """One row of the zoo: its models, their graphs, and what was found out so far."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.row = name, zoo.ROWS[name]
        self.model = zoo.make(self.row).to(dtype)
        self.exact = copy.deepcopy(self.model).double()
        self.exact.set_experts_implementation("eager")  # the default one of experts has no kernel for float64
        self.ids = zoo.prompt(LENGTH)
        self.traced: list[fx.GraphModule] = []

    @functools.cache  # noqa: B019 - as long as the family lives, which is one module of tests
    def compiled(self, policy: str):
        return kvfx.compile(self.model, policy, backend="eager", on_refuse="error")

    @functools.cache  # noqa: B019
    def read(self, length: int = LENGTH) -> tuple[list[zoo_reference.Read], list[zoo_reference.Read]]:
        """What attention reads of the first tokens, in the model's precision and in float64; queries not scaled yet."""
        reads = tuple(zoo_reference.capture(m, self.ids[:, :length], self.row.kv_heads)[0] for m in (self.model, self.exact))
        for read in (*reads[0], *reads[1]):
            read.query, read.pre_query = (states / self.row.query_scale for states in (read.query, read.pre_query))
        return reads

    def warning(self) -> contextlib.AbstractContextManager[object]:
        """Of a model that has nothing to compress."""
        nothing = "no cache layer of .* is compressed: all hold sliding windows"
        return contextlib.nullcontext() if self.row.full else pytest.warns(UserWarning, match=nothing)

    @functools.cached_property
    def half(self) -> tuple[kvfx.Cache, Tensor, Tensor]:
        """The prompt's cache, half of it kept; eight greedy tokens after it, and the logits of feeding each."""
        model = self.compiled("compactor:0.5")
        with pytest.MonkeyPatch.context() as patch, self.warning():
            patch.setattr(passes, "run", self._run)
            cache = model(self.ids).past_key_values  # whose graph is that of the call that keeps everything
        work, tokens, logits = cache.copy(), [zoo.prompt(1, seed=2)], []
        for _ in range(8):
            logits.append(model(tokens[-1], past_key_values=work).logits)
            tokens.append(logits[-1].argmax(-1))
        return cache, torch.cat(tokens[:-1], 1), torch.cat(logits, 1)

    @functools.cached_property
    def padded(self) -> tuple[kvfx.Cache, Tensor, Tensor]:
        """Two rows, the second padded on the left: cache, four tokens, logits of feeding each."""
        ids = torch.stack([self.ids[0], torch.cat([torch.zeros(LENGTH - SHORT, dtype=torch.long), self.ids[0, :SHORT]])])
        mask = torch.ones_like(ids)
        mask[1, : LENGTH - SHORT] = 0
        model = self.compiled("knorm:0.5")
        with self.warning():
            cache = model.compress(ids, mask)
        work, tokens, logits = cache.copy(), torch.cat([zoo.prompt(4, seed=2), zoo.prompt(4, seed=3)]), []
        for index in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            logits.append(model(tokens[:, index : index + 1], attention_mask=mask, past_key_values=work).logits)
        return cache, tokens, torch.cat(logits, 1)

    @functools.cached_property
    def explanation(self) -> Explanation:
        self.half  # noqa: B018 - which traces the model
        return kvfx.explain(self.compiled("compactor:0.5"))

    @functools.cached_property
    def decoding(self) -> Report:
        """What was found in the decode step after `half`."""
        self.half  # noqa: B018 - which decodes
        reports = self.compiled("compactor:0.5")._kvfx.engine.reports
        return next(reports[-1] for key, reports in reports.items() if key.phase == "decode" and not key.uneven)

    def _run(self, module: fx.GraphModule, plan: Plan) -> Report:
        """The passes, and a copy of the graph that they were given."""
        self.traced.append(copy.deepcopy(module))
        return REAL_RUN(module, plan)

    # -- the checks, each of which ends in a cell of docs/models.md ----------------------------------------------------------------

    @functools.cached_property
    def sites(self) -> str:
        """Every attention is found, and every layer that sees everything is compressed."""
        sites = self.explanation.report.sites
        assert [site.layer for site in sites] == list(range(len(self.row.layers))), self.explanation.report.reasons()
        assert [site.layer for site in sites if site.score and not site.refusal] == self.row.full
        for site in sites:
            assert (site.heads, site.kv_heads, site.head_dim) == (self.row.query_heads, self.row.kv_heads, 16)
        return ", ".join(dict.fromkeys(f"{site.rule}" for site in sites))

    @functools.cached_property
    def taps(self) -> str:
        """What a score reads is what attention read."""
        self.half  # noqa: B018 - which traces the model
        module = self.traced[0]
        plan, report = Plan(OpCall("taps", TAPS)), Report()
        find_attention(module, plan, report)
        attach_cache(module, plan, report)
        sites = [site for site in report.sites if site.layer in self.row.full]
        assert not any(site.refusal for site in sites), report.reasons()
        nodes = [site.nodes[tap] for site in sites for tap in TAPS]
        inputs = {"model": self.model, "tokens": {"input_ids": self.ids}, "seen": torch.zeros(1, dtype=torch.long)}
        found = iter(computed(module, nodes, **inputs))
        low, exact = self.read()
        for layer in self.row.full:
            assert low[layer].roped == self.row.roped[layer]
            for tap in TAPS:
                assert_within_rounding(next(found), getattr(low[layer], tap), getattr(exact[layer], tap).double())
        roped = [self.row.roped[layer] for layer in self.row.full]
        if not roped:
            return "nothing to score"
        return "yes" if all(roped) else "no RoPE" if not any(roped) else "yes, and layers without RoPE"

    @functools.cached_property
    def whole(self) -> str:
        """Keeping everything changes nothing."""
        self.half  # noqa: B018 - first, so that its graph is not one for this count alone
        model, tokens = self.compiled("compactor:1.0"), zoo.prompt(4, seed=2)
        first = model(self.ids)
        logits = [first.logits]
        for index in range(tokens.shape[1]):
            logits.append(model(tokens[:, index : index + 1], past_key_values=first.past_key_values).logits)
        text = torch.cat([self.ids, tokens], 1)
        with torch.no_grad():
            low, exact = (plain(text, use_cache=False).logits for plain in (self.model, self.exact))
        assert_within_rounding(torch.cat(logits, 1), low, exact)
        return "yes"

    @functools.cached_property
    def kept(self) -> str:
        """The reference's ranking decides what is kept."""
        cache, _, _ = self.half
        self.check_kept(cache, 0, "compactor", LENGTH)
        cache, _, _ = self.padded
        self.check_kept(cache, 0, "knorm", LENGTH)
        self.check_kept(cache, 1, "knorm", SHORT)
        return "compactor, knorm" if self.row.full else "nothing to evict"

    @functools.cached_property
    def uneven(self) -> str:
        """Decoding goes on as if the model did not see what is evicted, where every head evicts other tokens."""
        cache, tokens, logits = self.half
        if self.row.kv_heads > 1:
            for layer in self.row.full:
                heads = cache.layers[layer].positions[0].tolist()
                assert len({tuple(head) for head in heads}) > 1
        self.check_logits(cache, 0, LENGTH, tokens, logits)
        return "yes" if self.row.full else "nothing evicted"

    @functools.cached_property
    def rows(self) -> str:
        """A row of a padded batch decodes as if it were alone."""
        cache, tokens, logits = self.padded
        for row, length in enumerate((LENGTH, SHORT)):
            self.check_logits(cache, row, length, tokens[row : row + 1], logits[row : row + 1])
        return "yes"

    @functools.cached_property
    def block(self) -> str:
        """Several new tokens at once see what they would one by one."""
        cache, _, _ = self.half
        tokens = zoo.prompt(3, seed=4)
        logits = self.compiled("compactor:0.5")(tokens, past_key_values=cache.copy()).logits
        self.check_logits(cache, 0, LENGTH, tokens, logits)
        return "yes"

    # -- against the reference -----------------------------------------------------------------------------------------------------

    def check_kept(self, cache: kvfx.Cache, row: int, policy: str, length: int) -> None:
        low, exact = self.read(length)
        sinks, recent = PROTECTED[policy]
        count = reference.count_kept(length, "0.5", sinks + recent)
        for layer, kind in enumerate(self.row.layers):
            kept = [[p for p in head if p >= 0] for head in cache.layers[layer].positions[row].tolist()]
            assert len(kept) == self.row.kv_heads
            if kind != "full":
                assert kept == [list(range(length - zoo.WINDOW + 1, length))] * len(kept)  # with the next token, a window
                continue
            sketch = draw_sketch(0, layer, self.row.kv_heads, low[layer].key.shape[3], 48)
            score, best = (getattr(reference, policy)(zoo_reference.taps(read[layer]), sketch=sketch) for read in (low, exact))
            # Layer 0 reads the very tensors that the reference reads; deeper ones differ by what rounding did before them.
            noise = 0.0 if layer == 0 else 8 * float((score - best).abs().max())
            score = reference.protected(score, sinks, recent)
            for head, (ours, theirs) in enumerate(zip(kept, reference.best(score, count), strict=True)):
                assert len(ours) == count
                lost, won = reference.swapped(score[head], theirs, ours)
                for a, b in zip(sorted(lost), sorted(won), strict=True):
                    assert a < torch.inf, (layer, head, "a protected token was evicted")
                    assert a - b <= 1e-5 * max(abs(a), abs(b), 1.0) + noise, (layer, head, a, b)

    def hidden(self, cache: kvfx.Cache, row: int, length: int) -> list[Tensor | None]:
        """Slots of a full cache that `cache` does not have."""
        hidden = []
        for layer, kind in zip(cache.layers, self.row.layers, strict=True):
            evicted = torch.ones(1, self.row.kv_heads, length, dtype=torch.bool)
            for head, positions in enumerate(layer.positions[row].tolist()):
                evicted[0, head, [p for p in positions if 0 <= p < length]] = False
            hidden.append(evicted if kind == "full" else None)
        return hidden

    def check_logits(self, cache: kvfx.Cache, row: int, length: int, tokens: Tensor, logits: Tensor) -> None:
        assert_within_rounding(logits, *self.continued(self.ids[:, :length], self.hidden(cache, row, length), tokens))

    def continued(self, ids: Tensor, hidden: list[Tensor | None], tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The reference's logits, in the model's precision and in float64."""
        heads = self.row.kv_heads
        return tuple(zoo_reference.continue_with(plain, ids, heads, hidden, tokens) for plain in (self.model, self.exact))
