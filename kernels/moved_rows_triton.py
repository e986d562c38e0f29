"""How kernels copy rows of keys and values: whatever their type and however long, some rows a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_CHANNELS = 1024
TILE_BYTES = 16384  # of keys, and of values: of 128 threads, each has eight loads of 16 bytes under way for either
MOST_ROWS = 128
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, *INTEGERS, *FLOAT8)


def move_refused(*rows: Tensor) -> str | None:
    """Why rows like these, [..., D], are not copied; None if they are."""
    for tensor in rows:
        if tensor.dtype not in DTYPES:
            return f"{tensor.dtype} is not a type of keys and values that is copied"
        if tensor.shape[-1] > MAX_CHANNELS:
            return f"{tensor.shape[-1]} channels are more than {MAX_CHANNELS}"
    return None


def without_float8(tensor: Tensor) -> Tensor:
    """The same bytes; as integers where a chip may not know the type."""
    return tensor.view(torch.int8) if tensor.dtype in FLOAT8 else tensor


def rows_of_tile(*rows: Tensor) -> int:
    """How many rows, [..., D], a program copies."""
    longest = max(triton.next_power_of_2(tensor.shape[-1]) * tensor.element_size() for tensor in rows)
    return min(MOST_ROWS, TILE_BYTES // longest)


@triton.jit
def store_rows(base, rows, live, values, stride_row, stride_column, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write values, [len(rows), BLOCK_D], to rows of a matrix at `base`, but those behind its last column; see `load_rows`."""
    column = tl.arange(0, BLOCK_D)
    offset = rows.to(tl.int64)[:, None] * stride_row + column[None] * stride_column
    tl.store(base + offset, values, mask=live[:, None] & (column < COLUMNS)[None])
