"""A compressed decoder without transformers code: any `nn.Module` that returns its past grown, or writes to it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfx import tree
from kvfx.cache import Cache
from kvfx.cache_layer import CacheLayer
from kvfx.cache_step import check_finite, took
from kvfx.call import Call, call_of, check_place, refuse_padding, take_cache
from kvfx.decoder_step import caches_in_buffers, may_be_cache, step
from kvfx.engine import STORE_ALL, Engine, StepKey
from kvfx.errors import CacheMismatch, InputError, PolicyError, SiteRefused, UnsupportedModel
from kvfx.fingerprint import Owner, check_owner
from kvfx.form import BUFFERS, Past, form_of
from kvfx.passes.cache_leaf import Role, role_of
from kvfx.passes.cache_write import size_of
from kvfx.passes.capture import mark_dynamic
from kvfx.passes.plan import Plan
from kvfx.passes.report import Stranded
from kvfx.policy import Policy
from kvfx.runner import packed
from kvfx.tree import Spec


class CompressedDecoder(nn.Module):
    """What `kvfx.compile` returns for a decoder that is no transformers model.

    Called as the decoder itself is. Without a past it compresses; from a `kvfx.Cache` where the decoder takes its past it goes on,
    and new tokens are appended whole. What the decoder returns as its past is replaced by a `kvfx.Cache`: the largest element of
    its output that holds all keys and values, but not all else. The cache that was given stays as it was, as a past does.

    A decoder may also write to preallocated caches and return none. It then returns `out, cache` here. If its caches are arguments,
    it is first called with empty ones, which stay empty, and later with the `kvfx.Cache` in place of each argument that held any of
    them. If they are buffers of the module, which stay as they are, later calls are given `past=cache`. Where such a decoder takes
    the places to write to as an argument, they have to be the next ones: other numbers raise an `InputError`.

    The first tensor among the arguments that has two axes or more is taken for the new tokens, `[B, S]` or `[B, S, hidden]`. Rows
    have equal lengths: padding is refused where a boolean mask `[B, S]` or `[B, tokens seen + S]` shows it.
    """

    def __init__(self, base: nn.Module, policy: Policy, plan: Plan, engine: Engine, on_refuse: str) -> None:
        super().__init__()
        tree.learn_optree()
        self.base = base
        self._kvfx = DecoderRunner(base, policy, plan, engine, on_refuse)
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's own forward; the cache is compressed when it is first built."""
        return self._kvfx.forward(args, kwargs)

    def prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Compress a prompt: the forward without a past.

        Returns:
            What the decoder returns, with a `kvfx.Cache` in place of its own past; of a decoder that returns no past, a tuple of
            what it returns and the cache.

        Raises:
            CacheMismatch: a cache was given.
        """
        if any(isinstance(leaf, Cache) for leaf in tree.leaves_of((args, kwargs))):
            raise CacheMismatch("prefill starts a cache and was given one. Call the model itself to go on from it")
        return self(*args, **kwargs)

    def train(self, mode: bool = True) -> CompressedDecoder:
        """Only `eval` is possible.

        Raises:
            UnsupportedModel: `mode` is True.
        """
        if mode:
            raise UnsupportedModel("a compressed model is for inference; train the model that was given to kvfx.compile")
        return self


@dataclass
class DecoderRunner:
    """One decoder, one policy, and the engine that runs them."""

    base: nn.Module
    policy: Policy
    plan: Plan
    engine: Engine
    on_refuse: str
    layers: int = 0
    buffers: tuple[str, ...] | None = None
    accepted: tuple[Any, Owner | None] = (None, None)

    def __post_init__(self) -> None:
        if self.policy.budget is not None and self.policy.budget.pool != "uniform":
            raise PolicyError(
                f"{self.policy.name}: {self.policy.budget.pool} that compete leave slots of unequal lengths, and a decoder that is "
                "not of transformers keeps them in its own tensors. Write budget=uniform(...)."
            )

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the decoder: evicts if no cache is given, else appends."""
        if self.base.training:
            raise UnsupportedModel("the model is in training mode; call model.eval() first")
        given, kwargs = take_cache(kwargs)
        cache: Any = given
        leaves = [packed(leaf) if isinstance(leaf, Tensor) else leaf for leaf in tree.leaves_of((args, kwargs))]
        if cache is None and self.buffers is None and not any(isinstance(leaf, Cache) for leaf in leaves):
            self.buffers = caches_in_buffers(self.base, args, kwargs)
        call = call_of(self.base, args, kwargs, leaves, () if cache is not None else self.buffers or ())
        if cache is None and call.pasts:
            cache = leaves[call.pasts[0][0]]
        tokens = leaves[call.tokens]
        batch, length = tokens.shape[:2]
        held = 0 if cache is None else self._check(cache, call, batch)
        refuse_padding(leaves, call, held)
        if cache is not None:
            call = call.behind(held, leaves)
            for leaf in (*(leaf for leaf, _ in call.pasts), *call.counts):
                leaves[leaf] = None
            return self._append(cache, call, leaves)
        if self.policy.batch_coupled and batch > 1:
            raise InputError(f"{self.policy.name} needs one row, got {batch} rows: {self.policy.batch_coupled}")
        if length < self.policy.least_tokens:
            raise InputError(f"{self.policy.name} scores prompts of at least {self.policy.least_tokens} tokens, got {length}")
        return self._prefill(call, leaves)

    def _check(self, cache: Cache, call: Call, batch: int) -> int:
        """The tokens that a cache has seen, if it may be given to this decoder with so many rows."""
        if cache.form is None:
            raise CacheMismatch(
                "this cache does not say in which form the decoder keeps its past: it was not made by model.prefill of such a "
                "decoder. Compress the context again with this one."
            )
        check_owner(cache, self)
        check_place(cache, call)
        if cache.batch_size != batch:
            raise CacheMismatch(f"the cache has {cache.batch_size} rows, the new tokens {batch}")
        return cache.get_seq_length()

    def _prefill(self, call: Call, leaves: list[Any]) -> Any:
        tokens = leaves[call.tokens]
        cache = Cache()
        cache.lengths_seen = torch.zeros(tokens.shape[0], dtype=torch.long, device=tokens.device)
        mark_dynamic(cache.lengths_seen, 0)
        cache.policy = "none" if self.plan.score is None else str(self.policy)
        sizes = [] if self.plan.score is None else self._sizes(call, leaves)
        out = self._step("prefill", cache, call, leaves, None, sizes)
        cache.owner = Owner.of(self.base)
        cache.mark()
        return out

    def _append(self, cache: Cache, call: Call, leaves: list[Any]) -> Any:
        device, length = cache.lengths_seen.device, leaves[call.tokens].shape[1]
        layers = [(layer.keys, layer.values, layer.prefix) for layer in cache.layers]
        size = size_of(cache.get_seq_length(), device)
        mark_dynamic(size, 0)
        past = Past(cache.form, layers, cache.layers[0].next_position, cache.others, size)
        grown = cache.copy()
        try:
            out = self._step("decode" if length == 1 else "extend", grown, call, leaves, past, [])
        except Stranded as stranded:
            raise SiteRefused(
                f"slots were evicted from the cache of {self.engine.name}, but what reads them is not understood, so that the next "
                f"tokens cannot be computed:\n  {stranded}\nCompress with policy='none', or see kvfx.explain(model)."
            ) from stranded
        if cache.layers[0].slots == 1:
            grown.mark()  # a graph for one slot is specialised, and so are the marks of what it makes
        return out

    def _step(self, phase: str, cache: Cache, call: Call, leaves: list[Any], past: Past | None, sizes: list[Tensor]) -> Any:
        """Run one step and store in `cache` what it kept; what the decoder returns, with the cache in place of its past."""
        plan = self.plan if sizes else STORE_ALL
        for size in sizes:
            mark_dynamic(size, 0)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.dim() > 1:
                mark_dynamic(leaf, *((0,) if phase == "decode" or may_be_cache(leaf) else (0, 1)))
            elif (
                isinstance(leaf, Tensor) and leaf.dim() == 1 and phase != "decode" and leaf.shape[0] == leaves[call.tokens].shape[1]
            ):
                mark_dynamic(leaf, 0)  # says where each new token is written
        on_refuse = self.on_refuse if sizes else "warn"  # where nothing is evicted, nothing can be refused
        key = StepKey(phase, plan, on_refuse, ("layers",) if len(sizes) > 1 else ())
        (out, state), marks, seen = self._run(key, call, leaves, past, cache.lengths_seen, sizes)
        roles = [None if mark is None else role_of(mark[3]) for mark in marks]
        held = [layer.slots for layer in cache.layers]
        spec, returned = tree.spec_of(out), tree.leaves_of(out)
        split = len(returned)
        places: tuple[str, ...] = ()
        if any(role is not None and role.is_slots for role in roles[:split]):
            if BUFFERS in state:
                raise UnsupportedModel(
                    f"{self.engine.name} returns keys and values, and writes to its buffers {list(call.buffers)} too"
                )
            roles, marks = roles[:split], marks[:split]
            path, first = self._element(spec, returned, roles)
        else:
            state, chosen = self._kept_in(state, roles[split:])
            spec, returned = Spec("tuple", tuple, (), (spec, tree.spec_of(state))), [*returned, *tree.leaves_of(state)]
            roles, marks = (
                [*[None] * split, *(roles[split + index] for index in chosen)],
                [*marks[:split], *(marks[split + index] for index in chosen)],
            )
            path, first, places = [1], split, tuple(state)
        if past is not None:
            known = {tuple(role) for role in roles if role is not None and role.is_slots}
            if known != {leaf[1:] for leaf in past.form.leaves if leaf[0] == "slots"} or places != past.form.places:
                raise UnsupportedModel(
                    f"{self.engine.name} returns other keys and values, behind a past, than it did of the prompt"
                )
        part = slice(first, first + tree.count(tree.at(spec, path)))
        for role, mark in zip(roles, marks, strict=True):
            if role is None or not role.is_slots:
                continue
            while len(cache.layers) <= role.layer:
                cache.layers.append(CacheLayer())
            layer = cache.layers[role.layer]
            setattr(layer, "keys" if role.kind == "key" else "values", mark[0])
            if sizes:
                layer.kept_positions, layer.finite = mark[1], mark[2]
        if sizes:
            check_finite(cache.layers, self.policy)
        tokens = leaves[call.tokens]
        ids = tokens if tokens.dim() == 2 and not tokens.is_floating_point() else None
        took(cache, ids, None, seen, tokens.shape[1], held or [0] * len(cache.layers))
        if sizes:
            self._judge(returned[part], roles[part])
        cache.form, cache.others = form_of(tree.at(spec, path), returned[part], roles[part], cache.get_seq_length(), places)
        returned[part] = [cache]
        return tree.build(tree.without(spec, path), returned)

    def _run(self, key: StepKey, *arguments: Any) -> Any:
        try:
            return self.engine.run_step(key, step, self.base, *arguments)
        except RuntimeError as error:  # of an assertion in the graph
            if "kvfx: " not in str(error):
                raise
            raise InputError(str(error)[str(error).index("kvfx: ") + 6 :]) from error

    def _kept_in(self, state: dict[str, Any], roles: Sequence[Role | None]) -> tuple[dict[str, Any], list[int]]:
        """The arguments and buffers in which a decoder keeps its past, by name; and which of the leaves of all are theirs."""
        name, kept, chosen, first = self.engine.name, {}, list[int](), 0
        for place, held in state.items():
            leaves = range(first, first + len(tree.leaves_of(held)))
            if any((role := roles[leaf]) is not None and role.is_slots for leaf in leaves):
                kept[place] = held
                chosen += leaves
            first += len(leaves)
        if kept:
            return kept, chosen
        if any(role is not None and role.kind == "window" for role in roles):
            raise UnsupportedModel(f"all cache layers of {name} hold sliding windows, which no policy touches")
        raise UnsupportedModel(
            f"{name} returns no keys and values that an attention reads, so there is no cache to compress. Expected a decoder "
            "that returns its past, [B, heads, tokens, channels] in any order, in tuples, lists, dicts, named tuples, "
            "dataclasses or classes registered with torch's or optree's trees; or one that writes to arguments or buffers of its "
            "own, and returns none."
        )

    def _element(self, spec: Spec, returned: list[Any], roles: Sequence[Role | None]) -> tuple[list[int], int]:
        """The way to the element of the output that is the decoder's past, and its first leaf."""
        name = self.engine.name
        found = [index for index, role in enumerate(roles) if role is not None and role.is_slots]
        others = [index for index, leaf in enumerate(returned) if isinstance(leaf, Tensor) and index not in found]
        element = tree.element_with(spec, found, others)
        if element is None:
            raise UnsupportedModel(
                f"{name} returns its keys and values as several results, so that no one of them can be replaced by a cache. "
                "Expected one element of the output that holds them all, and goes back where the model takes its past."
            )
        return element

    def _judge(self, past: Sequence[Any], roles: Sequence[Role | None]) -> None:
        """Complain about tensors that may be keys or values and were not understood."""
        unknown = [leaf for leaf, role in zip(past, roles, strict=True) if role is None or role.kind == "other"]
        whole = [tuple(leaf.shape) for leaf in unknown if isinstance(leaf, Tensor) and leaf.dim() > 2 and leaf.is_floating_point()]
        if whole:
            text = f"{self.engine.name} returns, with its past, tensors {whole} that no attention found reads; they are kept whole"
            if self.on_refuse == "error":
                raise SiteRefused(text + ". Pass on_refuse='warn' to go on with what is understood.")
            warnings.warn(text, stacklevel=2)

    def _sizes(self, call: Call, leaves: list[Any]) -> list[Tensor]:
        """How many slots the graph shall hold of the prompt, per layer or for all."""
        tokens = leaves[call.tokens]
        counts = self.policy.counts(tokens.shape[1], self.layers or 3)
        if len(set(counts)) > 1 and not self.layers:
            # Only a run tells how many layers there are.
            trial = DecoderRunner(self.base, self.policy, STORE_ALL, Engine(self.engine.name, "eager"), "warn")
            out = tree.leaves_of(trial._prefill(call, leaves))
            self.layers = next(len(leaf.layers) for leaf in out if isinstance(leaf, Cache))
            counts = self.policy.counts(tokens.shape[1], self.layers)
        return [size_of(count, tokens.device) for count in (counts if len(set(counts)) > 1 else counts[:1])]
