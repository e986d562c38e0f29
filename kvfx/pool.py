"""A fixed amount of memory that many ragged caches share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvfx.block_pool import BLOCK, BlockPool
from kvfx.errors import InputError, PoolExhausted


class Pool:
    """Memory for keys, values and positions of many caches of one model: what one of them evicts, another can fill.

        pool = kvfx.Pool(bytes=4 * 2**30)
        model = kvfx.compile(model, "kv_compress(rate=8)", pool=pool)      # or kvfx.RaggedCache(pool=pool) for one cache

    It is taken from the device when the first cache asks, and kept: a cache that is dropped gives its blocks back to the pool, not
    to the device. Tables and metrics, some hundredths of it, are not counted.

    Attributes:
        bytes: the memory.
        block_size: slots of a block.
    """

    def __init__(self, bytes: int, block_size: int = BLOCK) -> None:
        """Set memory apart.

        Args:
            bytes: of keys, values and positions together.
            block_size: slots of a block, see `RaggedCache`.

        Raises:
            InputError: one of the two is no positive number.
        """
        if type(bytes) is not int or bytes < 1 or type(block_size) is not int or block_size < 1:
            raise InputError(f"bytes={bytes}, block_size={block_size}: a pool takes two positive whole numbers")
        self.bytes, self.block_size = bytes, block_size
        self._pools: dict[tuple[Any, ...], BlockPool] = {}

    @property
    def blocks(self) -> int:
        """Blocks that there are; 0 before a cache has asked."""
        return sum(pool.blocks for pool in self._pools.values())

    @property
    def free(self) -> int:
        """Blocks that no cache owns."""
        return sum(pool.free for pool in self._pools.values())

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, of the largest kind where layers differ; 0 before a cache has asked."""
        return max((pool.block_bytes for pool in self._pools.values()), default=0)

    def of(self, kinds: Mapping[tuple[Any, ...], tuple[Tensor, Tensor, int]]) -> dict[tuple[Any, ...], BlockPool]:
        """The blocks for each kind of slot of a model.

        Args:
            kinds: by what tells them apart, a key and a value of such slots, `[..., D]`, and how many heads of all layers
                have them; memory is divided so that each head gets equally many slots.

        Raises:
            PoolExhausted: there is no room for one block of each.
            InputError: caches of a model with other kinds have it.
        """
        if not self._pools:
            self._pools = self._divided(kinds)
        if self._pools.keys() != kinds.keys():
            raise InputError(
                f"this pool holds slots of {sorted(map(str, self._pools))}, and those of this model are {sorted(map(str, kinds))} "
                "(channels of keys and values, dtype, device). Give each model a pool of its own."
            )
        return self._pools

    def _divided(self, kinds: Mapping[tuple[Any, ...], tuple[Tensor, Tensor, int]]) -> dict[tuple[Any, ...], BlockPool]:
        pools = {kind: BlockPool(key, value, self.block_size) for kind, (key, value, _) in kinds.items()}
        spare = self.bytes - sum(pool.block_bytes for pool in pools.values())  # of each the block that is nobody's
        of_all = sum(pool.block_bytes * kinds[kind][2] for kind, pool in pools.items())
        for kind, pool in pools.items():
            pool.limit = spare * kinds[kind][2] // of_all
            if pool.limit < 1:
                raise PoolExhausted(
                    f"{self.bytes} bytes hold no block of {self.block_size} slots of {kind} (channels of keys and values, dtype, "
                    f"device), of {pool.block_bytes} bytes, beside the one that is nobody's. Make the pool larger."
                )
        for pool in pools.values():
            pool.fill_up()
        return pools
