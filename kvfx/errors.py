"""The errors kvfx raises. Each message says what happened, where, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KvfxError(Exception):
    """Base of every error that kvfx raises on purpose."""


class PolicyError(KvfxError, ValueError):
    """A policy is misspelt, contradicts itself or asks for something not built; raised before any model runs."""


class UnsupportedModel(KvfxError):
    """A model cannot be compiled: it is no causal decoder, is in training mode, or spans several devices."""


class SiteRefused(KvfxError):
    """An attention site was not understood and `on_refuse="error"`; by default it is reported and left as it was."""


class KernelUnavailable(KvfxError):
    """Triton kernels were asked for by `impl="triton"`, and one cannot run; by default its reference takes its place."""


class CacheMismatch(KvfxError, ValueError):
    """A cache does not belong to the tokens, the model or the call it is given to."""


class InputError(KvfxError, ValueError):
    """Arguments of a call make no sense together: an empty prompt, a mask of the wrong length, scores that are not finite."""


class ArtifactError(KvfxError):
    """A saved cache or an exported package is damaged, of an unknown version, or made for something else."""


class PoolExhausted(KvfxError):
    """A pool of cache blocks has no free block left for the tokens that are to be stored."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> PolicyError:
    """Return the error for an unknown name: it lists the known ones and guesses which was meant."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=1)
    guess = f" Did you mean '{close[0]}'?" if close else ""
    return PolicyError(f"unknown {what} '{name}'.{guess} Known: {', '.join(known) or 'none'}.")
