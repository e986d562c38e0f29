"""A package at work: compress, ask and generate, with nothing but compiled programs. No transformers, no torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader

from kvfx import package
from kvfx.errors import ArtifactError, CacheMismatch, InputError, PoolExhausted
from kvfx.package import PROGRAMS, WEIGHTS, About
from kvfx.sampling import Sampling


@dataclass
class PackagedCache:
    """The cache of a package: tensors of fixed shapes, which its programs write in place.

    Attributes:
        tensors: in the order of the package's `state`.
        files: checksums of the package that it goes with.
        seen: tokens seen, padding included.
        room: tokens that may still follow.
    """

    tensors: list[Tensor]
    files: Mapping[str, str]
    seen: int
    room: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def copy(self) -> PackagedCache:
        """A cache that goes its own way from here."""
        return PackagedCache([tensor.clone() for tensor in self.tensors], self.files, self.seen, self.room)


class Program(Protocol):
    """A compiled entry point: tensors in, tensors out, as `package.Entry` says."""

    def run(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run it. What it is given is not checked."""


class PackagedModel:
    """What `kvfx.load` returns. It keeps no state between calls, so that threads may share it, each with a cache of its own.

    Attributes:
        about: what the package says of itself.
        path: where it stands.
    """

    def __init__(self, path: Path, about: About, programs: Mapping[str, Program]) -> None:
        self.path, self.about, self._programs = path, about, programs
        self._device = torch.device(about.device)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns text into ids and back; no part of transformers.

        Raises:
            ArtifactError: the package holds none.
        """
        if "tokenizer.json" not in self.about.files:
            raise ArtifactError(f"{self.path} holds no tokenizer.json. Give ids, or export with tokenizer=FOLDER")
        return Tokenizer.from_file(str(self.path / "tokenizer.json"))

    # -- verbs -----------------------------------------------------------------------------------------------------------------

    def compress(self, ids: Tensor, attention_mask: Tensor | None = None) -> PackagedCache:
        """Compress a document once, to ask about it many times.

        Args:
            ids: `[B, S]` int64, S at most `about.max_prompt`.
            attention_mask: which tokens are real, `[B, S]`: padding stands on the left and is never kept.

        Returns:
            Its cache.

        Raises:
            InputError: ids or mask are not as the package takes them; or scores were not finite.
        """
        cache = self._empty_cache()
        self._prefill(cache, *self._check(ids, attention_mask))
        return cache

    def generate(self, ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Continue a text: ids and what was generated behind them, `[B, S + n]`. Arguments and errors are those of `stream`."""
        new = [token[:, None] for token in self.stream(ids, attention_mask, **options)]
        return torch.cat([ids.to(self._device), *new], 1)

    def ask(self, cache: PackagedCache, ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """What `generate` says behind a cache, which stays as it is."""
        return self.generate(ids, attention_mask, cache=cache.copy(), **options)

    def stream(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: PackagedCache | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Continue a text token by token. The prompt is read at once, each further token when the next is asked for.

        Args:
            ids: `[B, S]` int64: a prompt, or with `cache` what follows the tokens that it has seen.
            attention_mask: which of them are real, `[B, S]`: padding stands on the left.
            cache: goes on growing; the default is a new one, of the compressed prompt. As behind any forward, the last token that
                is generated has not been seen.
            max_new_tokens: the most to generate; the default is what there is room for.
            stop: token ids that end a row, which is then filled up with `about.pad`; the default is `about.stop`.
            temperature: what logits are divided by; 0 takes the likeliest token.
            top_k: draw among so many tokens of the highest logits; 0 means all.
            top_p: draw among the fewest tokens whose probabilities sum up to this.
            seed: of what draws; the default is torch's own generator.

        Returns:
            An iterator over tokens, `[B]` int64, that ends when all rows have.

        Raises:
            InputError: arguments are not as the package takes them, or scores were not finite.
            PoolExhausted: there is no room for so many tokens. Nothing was written.
            CacheMismatch: the cache is of another package.
        """
        sampling = Sampling(temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(self._device).manual_seed(seed)
        stops = torch.tensor([*(self.about.stop if stop is None else stop)], dtype=torch.long, device=self._device)
        ids, valid = self._check(ids, attention_mask)
        if cache is not None and cache.files != self.about.files:
            raise CacheMismatch("the cache was made by another package. Compress the context again with this one")
        room = self.about.max_new_tokens + 1 if cache is None else cache.room - ids.shape[1] + 1  # the last one is not fed
        wanted = room if max_new_tokens is None else max_new_tokens
        if not 1 <= wanted <= room:
            raise PoolExhausted(
                f"max_new_tokens={wanted}: behind {cache.seen if cache else 0} tokens seen and {ids.shape[1]} given there is room "
                f"for 1 to {room}. Nothing was written. Ask for fewer, or export with a larger max_new_tokens"
            )
        if cache is None:
            cache = self._empty_cache()
            logits = self._prefill(cache, ids, valid)
        else:
            logits = self._extend(cache, ids, valid)
        return self._tokens(cache, logits, wanted, stops, sampling, generator)

    def _tokens(
        self, cache: PackagedCache, logits: Tensor, count: int, stops: Tensor, sampling: Sampling, generator: Any
    ) -> Iterator[Tensor]:
        ended = torch.zeros(self.about.batch, dtype=torch.bool, device=self._device)
        for left in reversed(range(count)):
            token = sampling.choose(logits, generator).masked_fill(ended, self.about.pad)
            ended |= torch.isin(token, stops)
            yield token
            if not left or bool(ended.all()):
                return
            logits = self._extend(cache, token[:, None], None)

    # -- forwards --------------------------------------------------------------------------------------------------------------

    def _empty_cache(self) -> PackagedCache:
        tensors = [
            torch.full(held.shape, held.empty, dtype=getattr(torch, held.dtype), device=self._device) for held in self.about.state
        ]
        return PackagedCache(tensors, self.about.files, 0, self.about.max_new_tokens)

    def _check(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids and which of them are real, without columns that are padding in all rows; None if all are.

        A program takes whatever it is given: outside of the shapes and ranges that it was compiled for it is silently wrong.
        """
        batch, vocabulary = self.about.batch, self.about.vocabulary
        if ids.dim() != 2 or ids.shape[0] != batch or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(
                f"ids are {tuple(ids.shape)} {ids.dtype}, expected [{batch}, S] integers: the package was made for that"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise InputError(f"ids hold {int(ids.min())} to {int(ids.max())}, expected 0 to {vocabulary - 1}")
        ids = ids.to(self._device, torch.long)
        if mask is None:
            return ids, None
        if mask.shape != ids.shape:
            raise InputError(f"attention_mask is {tuple(mask.shape)}, expected {tuple(ids.shape)} like ids")
        valid = mask.to(self._device, torch.bool)
        if not bool(valid[:, -1].all()) or bool((valid[:, 1:] < valid[:, :-1]).any()):
            raise InputError("attention_mask has padding between tokens or on the right, or a row of nothing else. Pad on the left")
        longest = int(valid.sum(1).max())
        ids, valid = ids[:, -longest:], valid[:, -longest:]
        return ids, None if bool(valid.all()) else valid

    def _prefill(self, cache: PackagedCache, ids: Tensor, valid: Tensor | None) -> Tensor:
        """Logits behind a prompt, `[B, V]`."""
        entry, length = self.about.entries["prefill"], ids.shape[1]
        if length > entry.longest:
            raise InputError(
                f"the prompt has {length} tokens, the package takes 1 to {entry.longest}. Export with a larger max_prompt"
            )
        if valid is not None and not entry.masked:
            raise InputError(
                f"rows of different lengths, {valid.sum(1).tolist()}, of a decoder that takes no mask of padding. Give rows of "
                "equal lengths, or one by one"
            )
        if length == 1:  # of which nothing is evicted
            return self._run("first" if "first" in self.about.entries else "decode", cache, ids, None)
        return self._run("prefill", cache, ids, valid)

    def _extend(self, cache: PackagedCache, ids: Tensor, valid: Tensor | None) -> Tensor:
        """Logits behind further tokens, `[B, V]`."""
        entry, length = self.about.entries["extend"], ids.shape[1]
        if length > cache.room:
            raise PoolExhausted(f"the cache has room for {cache.room} tokens, and {length} are to follow: others went on in it")
        if valid is not None and not entry.masked:
            raise InputError(
                f"rows of different lengths, {valid.sum(1).tolist()}, after the first turn: padding would count as part of this "
                "model's sliding windows, or as distance in its biases, or it takes no mask. Give equally many new tokens to all "
                "rows"
            )
        if cache.seen == 1 and "second" in self.about.entries:
            logits, ids = self._run("second", cache, ids[:, :1], None), ids[:, 1:]
        if ids.shape[1]:
            logits = self._run("decode" if ids.shape[1] == 1 else "extend", cache, ids, valid)
        cache.room -= length
        return logits

    def _run(self, name: str, cache: PackagedCache, ids: Tensor, valid: Tensor | None) -> Tensor:
        entry = self.about.entries[name]
        front = [ids.contiguous()]
        if entry.masked:
            front.append(torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.contiguous())
        if entry.counted:
            front.append(torch.empty(cache.seen + 1, 0, device=self._device))
        logits, *finite = self._programs[name].run([*front, *cache.tensors])
        if finite and not bool(finite[0]):
            raise InputError(
                f"scores of {self.about.policy} are not finite: keys, queries or values hold inf or nan. Check the weights and the "
                "dtype (float16 overflows where bfloat16 does not)"
            )
        cache.seen += ids.shape[1]
        return logits


class WeightedProgram:
    """A program of a package with its weights, without which it would read address 0."""

    def __init__(self, loader: AOTIModelPackageLoader, weights: dict[str, Tensor]) -> None:
        loader.load_constants(weights, False, True, True)  # all of them, in the active place, and not copied
        self.run = loader.run
        self._weights = weights  # which the program only points to


def load(path: str | Path) -> PackagedModel:
    """Load a package that `export` wrote: a decoder that compresses and generates, without transformers and torch.compile.

    A package holds machine code: load only what comes from somebody you trust.

    Raises:
        ArtifactError: the package is missing, damaged, of an unknown format, or made for another machine or version of torch.

    Cost: reads all files once; programs share one copy of the weights.
    """
    path, about = Path(path), package.read(path)
    device = torch.device(about.device)
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        raise ArtifactError(f"{path} was compiled for {device.type}, and there is none here. Export it again on this machine")
    weights = {name: tensor.to(device) for name, tensor in load_file(path / WEIGHTS).items()}
    programs = {}
    for name, entry in about.entries.items():
        given = {constant: weights[held] for constant, held in entry.weights.items()}
        programs[name] = WeightedProgram(AOTIModelPackageLoader(str(path / PROGRAMS), name, False, 1, -1), given)
    return PackagedModel(path, about, programs)
