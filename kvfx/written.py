"""A decoder written by hand as a package calls it: with token ids, its past in its own form, and the number of tokens seen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvfx import tree
from kvfx.cache import Cache
from kvfx.decoder import CompressedDecoder
from kvfx.decoder_step import called, may_be_cache
from kvfx.engine import STORE_ALL, Engine
from kvfx.errors import InputError, KvfxError, SiteRefused, UnsupportedModel
from kvfx.form import BUFFERS, Form
from kvfx.policy import Policy

# (ids [B, S] int64, past or None, tokens seen before) -> the arguments of the forward by name
Calls = Callable[[Tensor, Any, int], Mapping[str, Any]]

SPARE = 2  # places of a preallocated cache behind the longest text: with one, or none, tensors are of a kind of their own
TOKENS = 37  # of the prompt by which a decoder's form is learnt: a number that is unlikely to be another one's too


class Returned(NamedTuple):
    """What a forward returns.

    Attributes:
        logits: [B, S or 1, V].
        past: the leaves of the decoder's past.
    """

    logits: Tensor
    past: list[Any]


@dataclass(frozen=True)
class Written:
    """A decoder written by hand, and what one forward told of it.

    Attributes:
        base: the decoder.
        call: with which arguments it is called.
        form: of its past.
        first: which leaf of its output is the first of its past, if it returns one.
        buffers: names of the module's buffers that it writes to.
        like: keys and values of one token in each layer, `[1, Hkv, 1, D]`.
        others: the tensors of its past that are neither keys nor values, with all rows.
        vocabulary: token ids are below it.
    """

    base: nn.Module
    call: Calls
    form: Form
    first: int
    buffers: tuple[str, ...]
    like: tuple[tuple[Tensor, Tensor], ...]
    others: tuple[Tensor, ...]
    vocabulary: int

    @classmethod
    def learn(cls, base: nn.Module, call: Calls | None, batch: int, longest: int, tokens: int) -> Written:
        """Run a prompt, eagerly and whole.

        Args:
            base: the decoder.
            call: with which arguments it is called; None if that is usual.
            batch: rows.
            longest: tokens of the longest prompt.
            tokens: tokens of the longest text.

        Raises:
            InputError: how the decoder is called is not known, or its own caches are too short.
            UnsupportedModel: it fails, its output holds no logits, or its past no keys and values.
            SiteRefused: it holds other caches too.
        """
        name, call = type(base).__name__, call or _usual_call(base)
        device = next((tensor.device for tensor in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        ids = torch.zeros(batch, min(TOKENS, longest), dtype=torch.long, device=device)
        decoder = CompressedDecoder(base, Policy.parse("none"), STORE_ALL, Engine(name, "eager"), "warn")
        try:
            arguments = dict(call(ids, None, 0))
            out = decoder.prefill(**arguments)
        except KvfxError:
            raise
        except Exception as error:
            raise UnsupportedModel(
                f"{name} fails on token ids {list(ids.shape)} without a past: {str(error).strip().partition(chr(10))[0]}\n"
                "Expected a decoder of token ids [B, S]; call= says with which other arguments it is called"
            ) from error
        leaves = tree.leaves_of(out)
        first, cache = next((index, leaf) for index, leaf in enumerate(leaves) if isinstance(leaf, Cache))
        form: Any = cache.form
        unknown = [list(other.shape) for other in cache.others if may_be_cache(other)]
        if unknown:
            raise SiteRefused(
                f"{name} returns, with its past, tensors {unknown} that are sliding windows or that no attention found reads. A "
                "package holds keys and values of all tokens that are kept. See kvfx.explain(model, policy=...)"
            )
        room = min((leaf[3] for leaf in form.leaves if leaf[0] == "slots" and leaf[3]), default=tokens + SPARE)
        if room < tokens + SPARE:
            raise InputError(
                f"the caches of {name} have room for {room} tokens, and texts of {tokens} are to be served: expected {SPARE} "
                "places more than tokens. Ask for fewer, or make its caches longer"
            )
        logits = _logits(name, out[0] if form.places else out, ids)
        like = tuple((layer.keys[:1, :, :1], layer.values[:1, :, :1]) for layer in cache.layers)
        written = decoder._kvfx.buffers or ()
        return cls(base, call, form, first, written, like, tuple(cache.others), logits.shape[-1])

    def run(self, ids: Tensor, past: Any, seen: Any) -> Returned:
        """One forward behind `seen` tokens, whose `past` stands in the decoder's own form; None if there are none. Also traced."""
        form = self.form
        arguments = dict(self.call(ids, None if form.places else past, seen))
        held = {name: tree.attribute(self.base, name).clone() for name in self.buffers}
        if past is not None and form.places:
            arguments |= {name: past[name] for name in form.places if name != BUFFERS}
            held = past.get(BUFFERS, held)
        out, after = called(self.base, (), arguments, held)
        logits = _logits(type(self.base).__name__, out, ids)
        if not form.places:
            leaves = tree.leaves_of(out)
            return Returned(logits, leaves[self.first : self.first + tree.count(form.spec)])
        state = {name: after if name == BUFFERS else arguments[name] for name in form.places}
        return Returned(logits, tree.leaves_of(state))


def _usual_call(base: nn.Module) -> Calls:
    """How a decoder is called whose forward takes token ids, and its past as the only other argument, None if there is none."""
    parameters = list(inspect.signature(base.forward).parameters.values())
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    usual = len(parameters) == 2 and parameters[1].default is None and not any(each.kind in kinds for each in parameters)
    if not usual:
        raise InputError(
            f"{type(base).__name__}.forward{inspect.signature(base.forward)} does not say what its arguments are. Expected token "
            "ids and the past, None by default. Say how it is called: export(..., call=lambda ids, past, seen: {...}), where `ids` "
            "[B, S] stand behind `seen` tokens, and the dict holds the arguments by name"
        )
    tokens, held = (each.name for each in parameters)
    return lambda ids, past, seen: {tokens: ids} | ({} if past is None else {held: past})


def _logits(name: str, out: Any, ids: Tensor) -> Tensor:
    """The logits in a decoder's output."""
    found = out
    if isinstance(out, Mapping):
        found = out.get("logits")
    elif not isinstance(out, Tensor):
        found = getattr(out, "logits", None)
        if found is None and isinstance(out, (tuple, list)):
            found = next(iter(out), None)
    if not isinstance(found, Tensor) or found.dim() != 3 or not found.is_floating_point():
        shape = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise UnsupportedModel(
            f"{name} returns {shape} where its logits are looked for. Expected [B, S, vocabulary] floats: the output itself, its "
            "first element, or its `logits`"
        )
    return found
