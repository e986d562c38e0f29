"""The marker on a tensor that a decoder returns and that may be keys or values of one of its layers.

Which it is, no trace of Python can say; `attach_leaves` sees it by dataflow and replaces the marker. What it found comes out of the
graph beside the tensors: as the shape of an empty one, since that costs nothing and differs where graphs differ.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvfx.passes.cache_write import LIBRARY

LIBRARY.define("cache_leaf(Tensor leaf, Tensor positions, Tensor[] sizes) -> (Tensor, Tensor, Tensor, Tensor)")
KINDS = ("other", "key", "value", "window")


class Role(NamedTuple):
    """What a returned tensor is.

    Attributes:
        kind: "key", "value", "window" (of keys or values that the decoder moves along itself) or "other".
        layer: whose.
        capacity: tokens that a preallocated tensor has room for; 0 if it grows.
        axes: for each of its axes, which of [B, Hkv, T, D] it is.
    """

    kind: str
    layer: int = 0
    capacity: int = 0
    axes: tuple[int, ...] = ()

    @property
    def is_slots(self) -> bool:
        """Whether it is keys or values of which some may be evicted."""
        return self.kind in ("key", "value")


def cache_leaf(leaf: Tensor, positions: Tensor, sizes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stand for what shall be stored of a returned tensor. The passes replace every call.

    Args:
        leaf: the returned tensor, in the decoder's own axes.
        positions: of the new tokens, [B, S], int32.
        sizes: as of `cache_write`, one for each layer or one for all; none if all is to be stored.

    Returns:
        keys or values [B, Hkv, n, D], their positions [B, Hkv, n], whether all scores were finite, and the role; each but the last
        is empty where it has no meaning.
    """
    nothing = leaf.new_empty(0)
    return leaf.clone(), positions.new_empty(0), torch.empty(0, dtype=torch.bool, device=leaf.device), nothing


def shape_of(role: Role) -> list[int]:
    """The shape of the empty tensor that stands for a role."""
    return [0, KINDS.index(role.kind), role.layer, role.capacity, *role.axes]


def role_of(empty: Tensor) -> Role:
    """The role that the shape of an empty tensor stands for."""
    _, kind, layer, capacity, *axes = empty.shape
    return Role(KINDS[kind], layer, capacity, tuple(axes))


torch.library.register_fake("kvfx::cache_leaf", cache_leaf)
MARK = torch.ops.kvfx.cache_leaf.default
