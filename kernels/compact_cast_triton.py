"""Move the kept tokens together and store them in 8 bits, in one launch: that of `compact`."""

import torch
from torch import Tensor

from .compact_triton import LARGEST, launch, turn_refused
from .moved_rows_triton import move_refused
from .tiles_triton import type_refused


def refusal(
    key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool, turns: Tensor | None, interleaved: bool,
    dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """See `KernelOp.refusal`."""
    if dtype not in LARGEST:
        return f"{dtype} is neither int8 nor float8_e4m3fn"
    return type_refused(key) or type_refused(value) or move_refused(key, value) or turn_refused(key, turns)


def compact_cast(
    key: Tensor, value: Tensor, positions: Tensor, slots: Tensor, padded: bool, turns: Tensor | None, interleaved: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the kernel of `compact`, which scales and rounds what it has read.

    Floor: the kept rows are read once, (D + Dv) * itemsize bytes a token, and written once, D + Dv bytes; 24 bytes of slots,
    positions and scales besides. What is turned reads its angles: the whole of `turns`, once, from memory.
    """
    keys, values, kept, key_scales, value_scales = launch(key, value, positions, slots, padded, turns, interleaved, dtype)
    return keys, values, kept, key_scales, value_scales
