"""Write rows of new tokens to slots of a buffer, in place."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def pack(
    pool_keys: Tensor,
    pool_values: Tensor,
    pool_positions: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    slots: Tensor,
    places: Tensor,
) -> None:
    """Copy keys, values and positions of chosen tokens to places of a pool of blocks, or of any buffer seen as one.

    Args:
        pool_keys: [N, P, D], N blocks of P slots, any strides; written.
        pool_values: [N, P, Dv]; written.
        pool_positions: [N, P] int32; written.
        key: [B, Hkv, S, D], of the pool's dtype, any strides.
        value: [B, Hkv, S, Dv].
        positions: [B, S] int32, position of each token in its sequence.
        slots: [B, M] int64, what is written: head*S + token, or -1 for nothing.
        places: [B, M] int64, where: block*P + slot in it; each at most once. Without meaning where nothing is written.

    Returns:
        Nothing.

    Numerics: bit copies (only a NaN's payload may change). Cost: reads and writes what is chosen once.
    """
    tokens, size = key.shape[2], pool_keys.shape[1]
    row = torch.arange(key.shape[0], device=key.device)[:, None].expand_as(slots).flatten()
    slots, places = slots.flatten(), places.flatten()
    # Where nothing is written, the first that is written is written again; if there is none, what stands at place 0 already.
    real = slots >= 0
    first = real.int().argmax(0, keepdim=True)
    some = real[first]
    source = torch.where(real, torch.arange(slots.shape[0], device=slots.device), first)
    place = torch.where(some, places[source], 0)
    target = place // size, place % size
    pair, row = slots[source].clamp(min=0), row[source]
    head, token = pair // tokens, pair % tokens
    for pool, new in (
        (pool_keys, key[row, head, token]),
        (pool_values, value[row, head, token]),
        (pool_positions, positions[row, token]),
    ):
        pool.index_put_(target, torch.where(some.reshape(1, *[1] * (new.dim() - 1)), new, pool[0, 0]))


def _inputs(dims, dtype, device, seed):
    B, H, _, S, D = dims
    key, value, order = samples(dtype, device, seed, (B, H, S, D), (B, H, S, D), (B, H * S))
    positions = torch.arange(S, dtype=torch.int32, device=device).repeat(B, 1)
    slots = order.argsort(-1)[:, : (H * S + 1) // 2].sort(-1).values
    slots = slots.masked_fill(slots % 5 == 4, -1)
    blocks, size = B * H * (S // 16 + 1), 16
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(blocks * size, generator=generator)[: slots.numel()].view_as(slots).to(device)
    pool = (torch.zeros(blocks, size, D, dtype=dtype, device=device) for _ in range(2))
    return *pool, torch.zeros(blocks, size, dtype=torch.int32, device=device), key, value, positions, slots, places


OP = KernelOp(
    "pack",
    "(Tensor(a!) pool_keys, Tensor(b!) pool_values, Tensor(c!) pool_positions, Tensor key, Tensor value, Tensor positions,"
    " Tensor slots, Tensor places) -> ()",
    pack,
    _inputs,
    triton="pack_triton:pack",
    cost="reads and writes 2*B*M*D elements",
)
