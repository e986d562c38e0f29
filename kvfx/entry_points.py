"""From a decoder to the programs of a package's entry points: traced, rewritten, and ready to be compiled.

Each is the forward that a compiled model traces with a static cache, rewritten by the same passes. What is an object there, the
cache, is a list of tensors here that every entry point takes and writes in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import kvfx
from kvfx import hf, package, passes
from kvfx.engine import STORE_ALL, engine_of, judge, refused
from kvfx.entry_point import EntryPoint
from kvfx.errors import InputError, SiteRefused, UnsupportedModel
from kvfx.fingerprint import fingerprint
from kvfx.lower import lower, lower_program
from kvfx.package import About, Entry, Held
from kvfx.passes import aoti, capture
from kvfx.passes.cache_write import size_of
from kvfx.passes.plan import Keep, Plan
from kvfx.passes.report import Stranded, Unscored, Unstored
from kvfx.policy import Policy, as_policy
from kvfx.quota import slots_of_prompt
from kvfx.static_cache import StaticCache

SHORTEST = 2  # tokens of a prefill or a block behind it; graphs for one are others, and a decode step serves it
LEAST = 4  # tokens of the longest prompt, and behind it: fewer are no range


@dataclass
class EntryPoints:
    """What the entry points of one package are made of.

    Attributes:
        model: the plain decoder.
        policy: what it keeps.
        plan: what a prefill evicts.
        keep: how much it keeps; None if all.
        cache: an empty one, with its tensors.
        max_prompt: tokens of the longest prompt.
        max_new_tokens: tokens that may follow it.
        settings: of Inductor.
        shows_padding: whether the model is to know which tokens of the text are padding.
    """

    model: Any
    policy: Policy
    plan: Plan
    keep: Keep | None
    cache: StaticCache
    max_prompt: int
    max_new_tokens: int
    settings: Mapping[str, Any]
    shows_padding: bool

    @classmethod
    def of(
        cls, model: Any, policy: Any, max_prompt: int, max_new_tokens: int, batch: int, settings: Mapping[str, Any]
    ) -> EntryPoints:
        """See `export`."""
        base, chosen, sketches = asked_for(model, policy)
        check_lengths(base, hf.text_limit(base), max_prompt, max_new_tokens, batch)
        windows = hf.windows(base)
        keep = lower_program(chosen, windows, sketches).keep  # which refuses what no program can follow
        plan, like = lower(chosen, sketches), engine_of(base, "inductor").slots_like(base)
        cache = empty_cache(chosen, like, windows, max_prompt, max_new_tokens, batch)
        takes_positions = "position_ids" in hf.forward_signature(base).parameters
        return cls(base, chosen, plan, keep, cache, max_prompt, max_new_tokens, settings, batch > 1 or not takes_positions)

    @property
    def kinds(self) -> dict[str, bool]:
        """The entry points by name, and whether rows of them may be padded, where that is possible."""
        masked = self.cache.batch_size > 1
        behind = masked and not any(layer.window for layer in self.cache.layers)  # see `block.uneven_turn`
        return {"prefill": masked, "extend": behind, "decode": False}

    def programs(self) -> dict[str, tuple[Entry, ExportedProgram]]:
        """All entry points."""
        return {kind: self.program(kind, masked) for kind, masked in self.kinds.items()}

    def program(self, kind: str, masked: bool) -> tuple[Entry, ExportedProgram]:
        """Trace and rewrite one entry point, which may take no mask though it is asked to.

        Raises:
            UnsupportedModel: the decoder cannot be traced, or not for all lengths that are wanted.
            SiteRefused: an attention is not understood.
        """
        plan, entry = self.plan if kind == "prefill" else STORE_ALL, self._entry(kind, masked)
        program = self._trace(kind, plan, entry)
        try:
            # Code that counts tokens asks about their number; all answers are tried on the range.
            report = passes.run(program, plan, marked=True, ask_small=entry.counted)
        except Unscored as unscored:
            raise SiteRefused(
                f"not every cache layer of {type(self.model).__name__} can be compressed, and a package leaves none alone:\n"
                f"  {unscored}\nExport with another policy, or with none"
            ) from unscored
        except (Stranded, Unstored) as stranded:
            raise refused(type(self.model).__name__, stranded) from stranded
        if plan.score is not None:
            judge(report, type(self.model).__name__, "error")
        if masked and kind == "extend" and report.counts_columns:  # see `block.uneven_turn`
            return self.program(kind, False)
        self._check_range(kind, program, self._lengths(kind, entry))
        return replace(entry, checks=plan.score is not None and bool(report.compressed)), program

    def compile(self, kind: str, entry: Entry, program: ExportedProgram) -> aoti.Files:
        """Compile one entry point.

        Raises:
            UnsupportedModel: the machine code would be right for some lengths only.
        """
        try:
            return aoti.compile_ahead(program, self._lengths(kind, entry), self.tokens + 1, self.settings)
        except aoti.Specialised as error:
            raise UnsupportedModel(f"{type(self.model).__name__} cannot be compiled for all lengths: {error}") from error

    def about(self, entries: Mapping[str, Entry]) -> About:
        """What the package says of itself."""
        stop, pad = self._stop()
        held = [
            Held(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), -1 if name.endswith("positions") else 0)
            for name, tensor in self._state().items()
        ]
        return About(
            model=type(self.model).__name__,
            policy=str(self.policy),
            batch=self.cache.batch_size,
            vocabulary=self._vocabulary(),
            max_prompt=self.max_prompt,
            max_new_tokens=self.max_new_tokens,
            stop=stop,
            pad=pad,
            device=self.cache.lengths_seen.device.type,
            versions={"kvfx": kvfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            machine=package.this_machine(),
            fingerprint=fingerprint(self.model),
            state=tuple(held),
            entries=entries,
            files={},
        )

    def _vocabulary(self) -> int:
        """Token ids are below it."""
        size: int = self.model.config.get_text_config(decoder=True).vocab_size
        return size

    def _stop(self) -> tuple[tuple[int, ...], int]:
        """The tokens that end a text, and the one that rows are filled up with."""
        generation = getattr(self.model, "generation_config", None)
        stop = getattr(generation, "eos_token_id", None)
        stop = [] if stop is None else [stop] if isinstance(stop, int) else stop
        pad = getattr(generation, "pad_token_id", None)
        return tuple(stop), pad if pad is not None else stop[0] if stop else 0

    @property
    def tokens(self) -> int:
        """Of the longest text."""
        return self.max_prompt + self.max_new_tokens

    def _entry(self, kind: str, masked: bool) -> Entry:
        longest = {"prefill": self.max_prompt, "extend": self.max_new_tokens}.get(kind, 1)
        return Entry(min(SHORTEST, longest), longest, masked, False, {})

    def _lengths(self, kind: str, entry: Entry) -> list[range]:
        """Of what may vary: new tokens, and the length that carries the number of those seen, one more than they are."""
        new = [range(entry.shortest, entry.longest + 1)] if entry.longest > 1 else []
        return new + ([range(SHORTEST + 1, self.tokens + 1)] if entry.counted and kind != "second" else [])

    def _module(self, kind: str, plan: Plan, masked: bool) -> nn.Module:
        """The entry point as a function of tensors."""
        most = self.cache.capacity - self.max_new_tokens
        keep = self.keep if kind == "prefill" else None
        return EntryPoint(self.model, kind, self.cache, plan, keep, most, masked, self.shows_padding)

    def _state(self) -> dict[str, Tensor]:
        """The tensors that every entry point takes and writes, by name, as they are in an empty cache."""
        return self.cache.tensors()

    def _trace(self, kind: str, plan: Plan, entry: Entry) -> ExportedProgram:
        device, batch = self.cache.lengths_seen.device, self.cache.lengths_seen.shape[0]
        length = max(entry.longest - 1, 1)
        varies: dict[int, Any] = {1: Dim.AUTO(min=SHORTEST, max=entry.longest)} if entry.longest > 1 else {}
        ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        front, shapes = list[Tensor](), list[dict[int, Any]]()
        if entry.masked:
            front, shapes = [torch.ones(batch, length, dtype=torch.bool, device=device)], [varies]
        if entry.counted:
            seen = 1 if kind == "second" else self.max_prompt - 1 - (self.max_prompt == length)  # no two sizes alike by chance
            front = [size_of(seen, device)]
            shapes = [{} if kind == "second" else {0: Dim.AUTO(min=SHORTEST + 1, max=self.tokens)}]
        held = [*front, *self._state().values()]
        shapes += [{} for _ in held[len(front) :]]
        try:
            module = self._module(kind, plan, entry.masked).eval()
            with torch.no_grad(), self._maskless(kind, entry.masked):
                return torch.export.export(module, (ids, held), dynamic_shapes=(varies, shapes), strict=False)
        except RuntimeError as error:
            if not self.shows_padding:
                self.shows_padding = True  # as `Runner._run_static`: without a mask the model would count the tokens seen
                return self._trace(kind, plan, entry)
            raise UnsupportedModel(
                f"{type(self.model).__name__} cannot be traced as a {kind}: {str(error).strip().splitlines()[0]}"
            ) from error

    def _maskless(self, kind: str, masked: bool) -> contextlib.AbstractContextManager[None]:
        whole = kind == "prefill" and not masked and hf.is_transformers(self.model)
        return hf.first_tokens_need_no_mask(self.model) if whole else contextlib.nullcontext()

    def _check_range(self, kind: str, program: ExportedProgram, wanted: Sequence[range]) -> None:
        """Make sure that a program takes all lengths wanted: to pad shorter ones would hide what the model's code asks."""
        bounds = [program.range_constraints.get(symbol) for symbol in capture.symbols_of(program)]
        found = [range(int(each.lower), int(each.upper) + 1) for each in bounds if each is not None]
        if found != list(wanted):
            given = _spans(found) if found else str(max(each[-1] for each in wanted) - 1)
            raise UnsupportedModel(
                f"the {kind} of {type(self.model).__name__} can be traced for {given} tokens only, and {_spans(wanted)} are "
                "wanted: its code asks how many there are"
            )


def _spans(lengths: Sequence[range]) -> str:
    """New tokens, and those seen before, which are one less than the length that carries them."""
    new, *seen = (f"{each[0]} to {each[-1]}" for each in (*lengths[:1], *(range(each[0] - 1, each[-1]) for each in lengths[1:])))
    return " behind ".join([new, *seen])


def asked_for(model: Any, policy: Any) -> tuple[Any, Policy, Any]:
    """The plain decoder, the policy, and the sketches that a compiled model brings with its own."""
    runner: Any = getattr(model, "_kvfx", None)
    if policy is None and runner is None:
        raise InputError(
            f"{type(model).__name__} was not made by kvfx.compile, so it has no policy. Pass one: "
            "export(model, path, 'compactor:0.5', ...)"
        )
    chosen = runner.policy if policy is None else as_policy(policy)
    return hf.unwrap(model), chosen, runner.plan.sketches if policy is None else None


def empty_cache(
    policy: Policy, like: Sequence[tuple[Tensor, Tensor]], windows: Sequence[int | None], prompt: int, new: int, batch: int
) -> StaticCache:
    """A cache with room for what is kept of `prompt` tokens, and `new` ones behind them."""
    kept = max(slots_of_prompt(policy, length, len(windows)) for length in range(1, prompt + 1))
    cache = StaticCache(kept + new, prompt + new)
    cache.allocate(like, windows, batch, prompt + new)
    return cache


def check_lengths(model: Any, limit: int | None, max_prompt: int, max_new_tokens: int, batch: int) -> None:
    """Make sure that the numbers make sense together.

    Raises:
        InputError: they do not.
    """
    if batch < 1 or max_prompt < LEAST or max_new_tokens < LEAST:
        raise InputError(
            f"max_prompt={max_prompt}, max_new_tokens={max_new_tokens}, batch={batch}: expected at least {LEAST} tokens "
            "of each and one row"
        )
    if limit is not None and max_prompt + max_new_tokens > limit:
        raise InputError(
            f"max_prompt={max_prompt} and max_new_tokens={max_new_tokens} make texts of {max_prompt + max_new_tokens} tokens, and "
            f"{type(model).__name__} was made for {limit}. Ask for less"
        )
