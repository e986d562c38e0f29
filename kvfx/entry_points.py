"""From a decoder to the programs of a package's entry points: traced, rewritten, and ready to be compiled.

Each is the forward that a compiled model traces with a static cache, rewritten by the same passes. What is an object there, the
cache, is a list of tensors here that every entry point takes and writes in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.export import Dim, ExportedProgram

import kvfx
from kvfx import hf, package, passes
from kvfx.engine import STORE_ALL, engine_of, judge, refused
from kvfx.entry_point import EntryPoint
from kvfx.errors import InputError, SiteRefused, UnsupportedModel
from kvfx.fingerprint import fingerprint
from kvfx.lower import lower, lower_program
from kvfx.package import About, Entry, Held
from kvfx.passes import aoti
from kvfx.passes.plan import Keep, Plan
from kvfx.passes.report import Stranded, Unscored
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
        base, chosen, plan, keep = _asked_for(model, policy)
        _check_lengths(base, max_prompt, max_new_tokens, batch)
        windows, tokens = hf.windows(base), max_prompt + max_new_tokens
        kept = max(slots_of_prompt(chosen, length, len(windows)) for length in range(1, max_prompt + 1))
        cache = StaticCache(kept + max_new_tokens, tokens)
        cache.allocate(engine_of(base, "inductor").slots_like(base), windows, batch, tokens)
        takes_positions = "position_ids" in hf.forward_signature(base).parameters
        return cls(base, chosen, plan, keep, cache, max_prompt, max_new_tokens, settings, batch > 1 or not takes_positions)

    def programs(self) -> dict[str, tuple[Entry, ExportedProgram]]:
        """All entry points. Rows of several may be padded, where that is possible."""
        masked = self.cache.batch_size > 1
        behind = masked and not any(layer.window for layer in self.cache.layers)  # see `block.uneven_turn`
        return {kind: self.program(kind, mask) for kind, mask in (("prefill", masked), ("extend", behind), ("decode", False))}

    def program(self, kind: str, masked: bool) -> tuple[Entry, ExportedProgram]:
        """Trace and rewrite one entry point, which may take no mask though it is asked to.

        Raises:
            UnsupportedModel: the decoder cannot be traced, or not for all lengths that are wanted.
            SiteRefused: an attention is not understood.
        """
        plan = self.plan if kind == "prefill" else STORE_ALL
        longest = {"prefill": self.max_prompt, "extend": self.max_new_tokens, "decode": 1}[kind]
        program = self._trace(kind, plan, masked, longest)
        try:
            report = passes.run(program, plan, marked=True)
        except Unscored as unscored:
            raise SiteRefused(
                f"not every cache layer of {type(self.model).__name__} can be compressed, and a package leaves none alone:\n"
                f"  {unscored}\nExport with another policy, or with none"
            ) from unscored
        except Stranded as stranded:
            raise refused(type(self.model).__name__, stranded) from stranded
        if plan.score is not None:
            judge(report, type(self.model).__name__, "error")
        if masked and kind == "extend" and report.counts_columns:  # see `block.uneven_turn`
            return self.program(kind, False)
        if kind != "decode":
            self._check_range(kind, program, longest)
        checks = plan.score is not None and bool(report.compressed)
        return Entry(1 if kind == "decode" else SHORTEST, longest, masked, checks, {}), program

    def compile(self, entry: Entry, program: ExportedProgram) -> aoti.Files:
        """Compile one entry point.

        Raises:
            UnsupportedModel: the machine code would be right for some lengths only.
        """
        try:
            return aoti.compile_ahead(program, range(entry.shortest, entry.longest + 1), self.settings)
        except aoti.Specialised as error:
            raise UnsupportedModel(f"{type(self.model).__name__} cannot be compiled for all lengths: {error}") from error

    def about(self, entries: Mapping[str, Entry]) -> About:
        """What the package says of itself."""
        model = self.model
        config, generation = model.config.get_text_config(decoder=True), getattr(model, "generation_config", None)
        stop = getattr(generation, "eos_token_id", None)
        stop = [] if stop is None else [stop] if isinstance(stop, int) else stop
        pad = getattr(generation, "pad_token_id", None)
        held = [
            Held(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), -1 if name.endswith("positions") else 0)
            for name, tensor in self.cache.tensors().items()
        ]
        return About(
            model=type(model).__name__,
            policy=str(self.policy),
            batch=self.cache.batch_size,
            vocabulary=config.vocab_size,
            max_prompt=self.max_prompt,
            max_new_tokens=self.max_new_tokens,
            stop=tuple(stop),
            pad=pad if pad is not None else stop[0] if stop else 0,
            device=self.cache.lengths_seen.device.type,
            versions={"kvfx": kvfx.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
            machine=package.this_machine(),
            fingerprint=fingerprint(model),
            state=tuple(held),
            entries=entries,
            files={},
        )

    def _trace(self, kind: str, plan: Plan, masked: bool, longest: int) -> ExportedProgram:
        keep = self.keep if kind == "prefill" else None
        device, batch = self.cache.lengths_seen.device, self.cache.lengths_seen.shape[0]
        length, most = 1 if kind == "decode" else longest - 1, self.cache.capacity - self.max_new_tokens
        varies: dict[int, Any] = {} if kind == "decode" else {1: Dim.AUTO(min=SHORTEST, max=longest)}
        ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        mask = [torch.ones(batch, length, dtype=torch.bool, device=device)] if masked else []
        held = [*mask, *self.cache.tensors().values()]
        shapes = (varies, [*(varies for _ in mask), *({} for _ in held[len(mask) :])])
        try:
            entry = EntryPoint(self.model, kind, self.cache, plan, keep, most, masked, self.shows_padding).eval()
            with torch.no_grad():
                return torch.export.export(entry, (ids, held), dynamic_shapes=shapes, strict=False)
        except RuntimeError as error:
            if not self.shows_padding:
                self.shows_padding = True  # as `Runner._run_static`: without a mask the model would count the tokens seen
                return self._trace(kind, plan, masked, longest)
            raise UnsupportedModel(
                f"{type(self.model).__name__} cannot be traced as a {kind}: {str(error).strip().splitlines()[0]}"
            ) from error

    def _check_range(self, kind: str, program: ExportedProgram, longest: int) -> None:
        """Make sure that a program takes all lengths that are wanted: to pad shorter ones would hide what the model's code asks."""
        bounds = [(int(each.lower), int(each.upper)) for each in program.range_constraints.values()]
        if bounds != [(SHORTEST, longest)]:
            found = f"{bounds[0][0]} to {bounds[0][1]}" if bounds else str(longest - 1)
            raise UnsupportedModel(
                f"the {kind} of {type(self.model).__name__} can be traced for {found} tokens only, and {SHORTEST} to {longest} are "
                "wanted: its code asks how many there are"
            )


def _asked_for(model: Any, policy: Any) -> tuple[Any, Policy, Plan, Keep | None]:
    """The plain decoder, what its prefill evicts, and how much it keeps."""
    runner: Any = getattr(model, "_kvfx", None)
    if policy is None and runner is None:
        raise InputError(
            f"{type(model).__name__} was not made by kvfx.compile, so it has no policy. Pass one: "
            "export(model, path, 'compactor:0.5', ...)"
        )
    base = hf.unwrap(model)
    if not hf.is_transformers(base):
        raise UnsupportedModel(
            f"{type(base).__name__} is no transformers model, and a package is made of a static cache, which only those take. "
            "torch.export its prefill and run kvfx.passes.run on that; see README.md"
        )
    chosen = runner.policy if policy is None else as_policy(policy)
    sketches = runner.plan.sketches if policy is None else None
    keep = lower_program(chosen, hf.windows(base), sketches).keep  # which refuses what no program can follow
    return base, chosen, lower(chosen, sketches), keep


def _check_lengths(model: Any, max_prompt: int, max_new_tokens: int, batch: int) -> None:
    if batch < 1 or max_prompt < LEAST or max_new_tokens < LEAST:
        raise InputError(
            f"max_prompt={max_prompt}, max_new_tokens={max_new_tokens}, batch={batch}: expected at least {LEAST} tokens "
            "of each and one row"
        )
    limit = hf.text_limit(model)
    if limit is not None and max_prompt + max_new_tokens > limit:
        raise InputError(
            f"max_prompt={max_prompt} and max_new_tokens={max_new_tokens} make texts of {max_prompt + max_new_tokens} tokens, and "
            f"{type(model).__name__} was made for {limit}. Ask for less"
        )
