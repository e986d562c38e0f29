"""Which policies are of a kind, so that a picture of many can be read."""

from __future__ import annotations

from kvfx.algebra import Atom
from kvfx.policy import Policy

COMPACTOR = "compactor and its parts"
SEEN = "attention that was seen"
EXPECTED = "attention that is expected"
KEYS = "geometry of keys"
BASELINES = "baselines"
OTHERS = "others"
FAMILIES = (COMPACTOR, SEEN, EXPECTED, KEYS, BASELINES, OTHERS)

# By score atom. A policy is of the first family, in the order above, that one of its atoms is of.
_OF_ATOM = {
    "leverage": COMPACTOR,
    "kvpress_compactor": COMPACTOR,
    "kvpress_window": SEEN,
    "expected": EXPECTED,
    "kvpress_expected": EXPECTED,
    "knorm": KEYS,
    "keydiff": KEYS,
    "redundancy": KEYS,
    "lag": KEYS,
    "random": BASELINES,
    "recency": BASELINES,
}


def family_of(policy: Policy) -> str:
    """The family of a policy, by what its score reads."""
    families = {_family(atom) for atom in policy.atoms()}
    return next((family for family in FAMILIES if family in families), OTHERS)


def _family(atom: Atom) -> str:
    if atom.name == "attn":  # of its own chunk without a mask: half of compactor's score
        return COMPACTOR if str(dict(atom.values)["q"]).startswith("chunk") else SEEN
    return _OF_ATOM.get(atom.name, OTHERS)
