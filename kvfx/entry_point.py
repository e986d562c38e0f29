"""An entry point of a package: one forward of a compressed decoder as a function of tensors, which `torch.export` can trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvfx import hf
from kvfx.engine import step
from kvfx.passes.cache_write import size_of
from kvfx.passes.plan import Keep, Plan
from kvfx.static_cache import StaticCache
from kvfx.static_layer import StaticLayer
from kvfx.static_slots import StaticSlots


class EntryPoint(nn.Module):
    """The forward that a compiled model traces with a static cache, whose tensors are arguments here.

    Called as `(ids, held)`: `ids` [B, S] int64; `held`, with `masked`, begins with which of them are real, [B, S] bool, and goes on
    with the tensors of the cache, in the order of `names`, which are written in place. Returns the logits of the last token, [B, V]
    float32; where slots are chosen also whether all scores were finite, [] bool.

    Attributes:
        names: of the tensors of the cache, as `StaticCache.tensors` names them.
    """

    def __init__(
        self,
        model: Any,
        kind: str,
        cache: StaticCache,
        plan: Plan,
        keep: Keep | None,
        most: int,
        masked: bool,
        shows_padding: bool,
    ) -> None:
        """Make an entry point.

        Args:
            model: a transformers decoder.
            kind: "prefill", "extend" or "decode".
            cache: an empty one, for the shapes of its tensors.
            plan: what it evicts.
            keep: how much of the new tokens stays; None if all do.
            most: the most slots that a layer ever gets of them.
            masked: whether rows may be padded on the left.
            shows_padding: whether the model is to know which tokens of the text are padding.
        """
        super().__init__()
        self.model, self.kind, self.plan, self.keep, self.most = model, kind, plan, keep, most
        self.masked, self.shows_padding = masked, shows_padding
        assert cache.tokens is not None
        self.tokens, self.names = cache.tokens, tuple(cache.tensors())
        self._layers = cache.about()["layers"]
        # Layers that keep unlike numbers, and whether one may keep a single slot: as elsewhere, graphs are for two and more.
        self._unlike = range(len(self._layers) if keep is not None and keep.pyramid else 1)
        lengths = range(2, self.tokens + 1)
        self._keeps_one = keep is not None and any(keep.slots(each, layer) < 2 for layer in self._unlike for each in lengths)
        parameters = hf.forward_signature(model).parameters
        self._takes_positions = "position_ids" in parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def forward(self, ids: Tensor, held: list[Tensor]) -> tuple[Tensor, ...]:
        """One forward."""
        valid, state = (held[0], held[1:]) if self.masked else (None, held)
        tensors = dict(zip(self.names, state, strict=True))
        layers = [StaticLayer.of_state(index, tensors, facts) for index, facts in enumerate(self._layers)]
        sizes, counts = self._quota(ids, valid)
        longest = size_of(self.tokens, ids.device)
        has_past = self.kind != "prefill"
        slots = StaticSlots(layers, self.plan, sizes, counts, longest, has_past, self.shows_padding, frozenset())
        given = (tensors["lengths_seen"], valid, {"input_ids": ids}, self._options, self._takes_positions)
        out, _ = step(self.model, slots, *given)
        return self._answer(out.logits, layers)

    def _answer(self, logits: Tensor, layers: list[StaticLayer]) -> tuple[Tensor, ...]:
        """The last token's logits, and of a policy that evicts whether all scores were finite."""
        last, finite = logits[:, -1].float(), [layer.finite for layer in layers if layer.finite is not None]
        return (last, torch.stack(finite).all()) if finite else (last,)

    def _quota(self, ids: Tensor, valid: Tensor | None) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """What `quota.quota` says outside of a graph: how many slots there are of the new tokens, and how many each row fills."""
        if self.keep is None:
            return None, None
        length = ids.shape[1]
        slots = [self.keep.slots(length, layer) for layer in self._unlike]
        if valid is None and not self._keeps_one:
            return [size_of(each, ids.device) for each in slots], None
        if valid is not None and self.keep.pyramid:  # a layer may keep more of a shorter row
            slots = [torch.sym_min(length, self.most) for _ in slots]
        real = (torch.ones_like(ids) if valid is None else valid).sum(-1)
        counts = [self.keep.slots(real, layer) for layer in self._unlike]
        return [size_of(torch.sym_max(each, 2), ids.device) for each in slots], counts
