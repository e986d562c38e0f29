"""Which blocks of a pool hold the slots of each layer, row and KV head: known on the host, and as tensors that graphs read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvfx.block_pool import NOBODY, BlockPool
from kvfx.metric import Metric
from kvfx.passes.capture import mark_dynamic
from kvfx.work_list import WorkList, chunk_of, work_list


class Extents:
    """An extent is the run of slots of one layer, row and KV head; as long as that head has tokens, and spread over blocks.

    The host knows all lengths without asking the device: it is told those that eviction chose, and every other step adds as many to
    all heads of a row. What the host knows is what holds: tensors that no longer say so are dropped, and made again when they are
    asked for, so that nothing is half changed where a device is out of memory.

    Attributes:
        pool: the blocks.
        lengths: slots of each extent, `[L, B, Hkv]` int64.
        owned: blocks of each extent, `[L, B, Hkv]`: as many as its length needs, and some that wait for what comes.
        ready: tokens of each row for which all that `make_room` does is done, `[B]`. A fork does not end that: whoever had room
            first writes on behind what the others hold of a block, and they part from it when they grow.
        table: these blocks in order, `[L, B, Hkv, m]` int32; behind them `pool.NOBODY`.
        metric: what attention each slot has received, where a policy goes by that; or None.
    """

    def __init__(self, pool: BlockPool, layers: int, rows: int, heads: int) -> None:
        self.pool = pool
        self.lengths: np.ndarray = np.zeros((layers, rows, heads), dtype=np.int64)
        self.owned: np.ndarray = np.zeros_like(self.lengths)
        self.ready: np.ndarray = np.zeros(rows, dtype=np.int64)
        self.table: np.ndarray = np.zeros((layers, rows, heads, 2), dtype=np.int32)
        self.metric: Metric | None = None
        self._device: tuple[Tensor, Tensor] | None = None
        self._work: WorkList | None = None

    # -- what is held ----------------------------------------------------------------------------------------------------------

    @property
    def blocks(self) -> np.ndarray:
        """The blocks owned, those that several extents share several times."""
        return self.table[self._first(self.owned)]

    def _needed(self, lengths: np.ndarray) -> np.ndarray:
        return -(-lengths // self.pool.block_size)

    def _first(self, blocks: np.ndarray) -> np.ndarray:
        """Which places of the table are the first `blocks` ones of their extents."""
        return np.arange(self.table.shape[3]) < blocks[..., None]

    def slots(self, layer: int) -> np.ndarray:
        """Where in the pool the slots of a layer are, extent behind extent, `[sum of lengths]` int64."""
        lengths, size = self.lengths[layer].flatten(), self.pool.block_size
        extent = np.repeat(np.arange(len(lengths)), lengths)
        at = np.arange(len(extent)) - np.repeat(lengths.cumsum() - lengths, lengths)
        blocks = self.table[layer].reshape(len(lengths), -1)
        return blocks[extent, at // size].astype(np.int64) * size + at % size

    def tensors(self) -> list[Tensor]:
        """What is held on the device beside the pool."""
        return [self.device_lengths, self.device_table, *self.work, *([self.metric.received] if self.metric else [])]

    # -- room for what comes ---------------------------------------------------------------------------------------------------

    def make_room(self, new: Sequence[int]) -> None:
        """Have room for `new[b]` more slots in all extents of row b.

        Raises:
            PoolExhausted: there is none. Nothing has changed.
        """
        if (self.ready >= new).all():
            return
        more = np.asarray(new)[None, :, None]
        wanted = np.maximum(self.owned, self._needed(self.lengths + more))
        shared = self._shared_tails(more > 0)
        # A block more for each, lest there be another extent that needs one at every step.
        ahead = np.maximum(wanted, np.where(more > 0, self._needed(self.lengths + more + self.pool.block_size - 1), 0))
        if self.pool.allows(int((ahead - self.owned).sum()) + len(shared[0])):
            wanted = ahead
        self._own(wanted, self._take(int((wanted - self.owned).sum()), shared))
        room = (self.owned * self.pool.block_size - self.lengths).min((0, 2))
        self.ready = np.where(np.asarray(new) > 0, room, 0)  # the tail of a row that did not ask may still be shared

    def fill(self, lengths: np.ndarray) -> None:
        """Own blocks for extents of these lengths, `[L, B, Hkv]`; there were none.

        Raises:
            PoolExhausted: there is no room for them.
        """
        needed = self._needed(lengths)
        self._own(needed, self.pool.take(int(needed.sum())))
        self.lengths = lengths.astype(np.int64)

    def reserve(self, kept: Sequence[int]) -> np.ndarray:
        """Own blocks enough for each layer to keep `kept[b]` more slots for every head of row b, whichever heads get them.

        Returns:
            Blocks, `[L, R]`.

        Raises:
            PoolExhausted: there are not so many. Nothing has changed.
        """
        self.undo()
        layers, _, heads = self.lengths.shape
        spare = self.pool.block_size - 1
        most = max(2, sum((count * heads + spare * heads) // self.pool.block_size for count in kept))
        return self._take(layers * most, self._shared_tails(np.ones_like(self.lengths, dtype=bool))).reshape(layers, most)

    def adopt(self, new: np.ndarray, reserved: np.ndarray) -> None:
        """Let extents grow by `new`, `[L, B, Hkv]`, into reserved blocks, as `kernels.place` does; give the others back."""
        wanted = self._needed(self.lengths + new)
        used = np.arange(reserved.shape[1]) < (wanted - self.owned).sum((1, 2))[:, None]
        self._own(wanted, reserved[used])
        self.pool.release(reserved[~used])
        self.lengths = self.lengths + new

    def claim(self, new: np.ndarray) -> None:
        """Own blocks for `new` more slots of each extent, `[L, B, Hkv]`, which are still to be written.

        Raises:
            PoolExhausted: there are not so many. Nothing has changed.
        """
        self.undo()
        wanted = self._needed(self.lengths + new)
        self._own(wanted, self._take(int((wanted - self.owned).sum()), self._shared_tails(new > 0)))

    def written(self, new: np.ndarray) -> None:
        """Note that `new` more slots of each extent, `[L, B, Hkv]`, have been written to blocks that it owns."""
        self.lengths = self.lengths + new
        self._changed()

    def measure(self, received: Sequence[Tensor]) -> None:
        """Note what attention slots have received, of each layer `[sum of lengths]` float32, extent behind extent."""
        numbers = received[0].new_zeros(*self.lengths.shape, max(1, int(self.lengths.max())))
        there = torch.from_numpy(np.arange(numbers.shape[3]) < self.lengths[..., None]).to(numbers.device)
        numbers[there] = torch.cat(list(received))
        self.metric = Metric.of_slots(numbers, self.lengths, chunk_of(self.pool.block_size))

    def part(self, where: tuple[np.ndarray, ...]) -> None:
        """Own a copy of each block at `where`, indices into `table`, in place of one that others hold too.

        Raises:
            PoolExhausted: there is no room for the copies. Nothing has changed.
        """
        self._take(0, where)

    def shared(self) -> np.ndarray:
        """Which blocks others hold too, as `table`."""
        return self._first(self.owned) & (self.pool.owners(self.table) > 1)

    def grow(self, new: Sequence[int]) -> None:
        """Note that a graph has filled `new[b]` more slots in all extents of row b, and counted them."""
        self.lengths += np.asarray(new)[None, :, None]
        self.ready -= new

    def undo(self, lengths: np.ndarray | None = None) -> None:
        """Give back the room that was made for what did not come; with `lengths`, be no longer than that."""
        self.lengths = self.lengths if lengths is None else lengths
        needed = self._needed(self.lengths)
        self.pool.release(self.table[self._first(self.owned) & ~self._first(needed)])
        self._keep(needed)

    def _keep(self, blocks: np.ndarray) -> None:
        self.table[~self._first(blocks)] = NOBODY
        self.owned = blocks
        self._changed()

    def _own(self, wanted: np.ndarray, taken: np.ndarray) -> None:
        """Let extents own `wanted` blocks, more than they do; `taken` are those that come."""
        missing = int(wanted.max()) - self.table.shape[3]
        if missing > 0:
            self.table = np.pad(self.table, ((0, 0), (0, 0), (0, 0), (0, missing + 1)))
        self.table[self._first(wanted) & ~self._first(self.owned)] = taken
        self.owned = wanted
        self._changed()

    def _changed(self) -> None:
        """Let tensors be made again, and the next step see to its room."""
        self._device = self._work = None
        self.ready[:] = 0

    def _shared_tails(self, grows: np.ndarray) -> tuple[np.ndarray, ...]:
        """The extents that grow into a block which others hold too, and its index."""
        last = np.maximum(self.lengths - 1, 0) // self.pool.block_size
        tail = np.take_along_axis(self.table, last[..., None], 3)[..., 0]
        partly = (self.lengths % self.pool.block_size > 0) & grows & (self.pool.owners(tail) > 1)
        where = np.nonzero(partly)
        return (*where, last[where])

    def _take(self, count: int, shared: tuple[np.ndarray, ...]) -> np.ndarray:
        """Own `count` more blocks, and in place of those that are shared copies of one's own.

        Raises:
            PoolExhausted: there are not so many. Nothing has changed.
        """
        taken = self.pool.take(count + len(shared[0]))
        copies, others = np.split(taken, [len(shared[0])])
        try:
            self.pool.copy_blocks(self.table[shared], copies)
        except BaseException:
            self.pool.release(taken)
            raise
        self.pool.release(self.table[shared])  # who is the last to share one may be left with it alone
        self.table[shared] = copies
        self._changed()
        return others

    # -- edits -----------------------------------------------------------------------------------------------------------------

    def rows(self, index: Sequence[int]) -> None:
        """Let row i become row `index[i]`, sharing its blocks."""
        before = self.blocks
        self.lengths, self.owned = (np.ascontiguousarray(held[:, list(index)]) for held in (self.lengths, self.owned))
        self.table = np.ascontiguousarray(self.table[:, list(index)])
        if self.metric is not None:
            self.metric = self.metric.rows(index, self.lengths)
        self.ready = np.zeros(len(index), dtype=np.int64)
        self._keep(self._needed(self.lengths))  # what waits to be written cannot be shared
        self.pool.share(self.blocks)
        self.pool.release(before)

    def cut(self, tokens: int) -> None:
        """Forget the last `tokens` slots of every extent."""
        self.undo(self.lengths - tokens)

    def fork(self) -> Extents:
        """Extents of the same slots that go their own way: blocks are shared until one of the two writes to them."""
        other = Extents(self.pool, *self.lengths.shape)
        other.take_over(self.lengths.copy(), self.table.copy())
        other.metric = self.metric
        return other

    def take_over(self, lengths: np.ndarray, table: np.ndarray) -> None:
        """Hold what others do, in the blocks that they have; there was nothing."""
        self.lengths, self.table = lengths, table
        self._keep(self._needed(lengths))
        self.pool.share(self.blocks)

    def drop(self) -> None:
        """Own nothing any more."""
        self.undo(np.zeros_like(self.lengths))

    def __del__(self) -> None:
        if hasattr(self, "table"):
            self.drop()

    # -- for graphs ------------------------------------------------------------------------------------------------------------

    @property
    def device_lengths(self) -> Tensor:
        """`lengths` for graphs, which count them on."""
        return self._uploaded()[0]

    @property
    def device_table(self) -> Tensor:
        """`table` for graphs."""
        return self._uploaded()[1]

    @property
    def work(self) -> WorkList:
        """How attention splits its work, see `kvfx.work_list`; of all blocks owned, so it stays right while they fill."""
        if self._work is None:
            size = self.pool.block_size
            work = work_list(self.owned * size, self.table, size, chunk_of(size))
            if self.metric is not None:
                self.metric = self.metric.laid_out(work.merge.numpy())
            work = WorkList(*(part.to(self.pool.keys.device) for part in work))
            for part in work[:3]:
                mark_dynamic(part, 1)
            mark_dynamic(work.merge, 1, 3)
            self._work = work
        return self._work

    def _uploaded(self) -> tuple[Tensor, Tensor]:
        """Say on the device what the host knows."""
        if self._device is None:
            lengths, table = (torch.from_numpy(held.copy()).to(self.pool.keys.device) for held in (self.lengths, self.table))
            mark_dynamic(lengths, 1)
            mark_dynamic(table, 1, 3)
            self._device = lengths, table
        return self._device
