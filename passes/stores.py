"""Caches that are there before any token: with room for many, written in one of many spellings and read back; or empty.

What such a read returns is what was held with what was written behind it, and in these words the other passes understand it. A read
of the whole tensor, unwritten places and all, is marked: `shorten_reads` looks at the mask that hides them. Of a tensor that is
written to in a way that is not understood, nothing is known any more.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from kvfx.passes import capture
from kvfx.passes.axes import peel
from kvfx.passes.cache_leaf import MARK
from kvfx.passes.cache_read import READ
from kvfx.passes.content import COPIES, FILLED, MADE, Content, apart, length_of
from kvfx.passes.graph import aten, call, inputs, is_call, replace, val
from kvfx.passes.new_states import NEW
from kvfx.passes.plan import Plan
from kvfx.passes.report import Refuse, Report
from kvfx.passes.store_spellings import (
    SPELLINGS,
    WHOLE,
    Store,
    below,
    plus,
    same,
    size,
    store_of,
    taken_apart,
    viewed,
    whole_cat,
    writes,
)
from kvfx.passes.unread import drop_needless_copies
from kvfx.passes.windows import SHIFTED, WINDOW, note_shift, window_of


def forward_stores(module: fx.GraphModule, plan: Plan, report: Report) -> None:
    """Replace reads of what was written by what was written; take out copies of arguments that nothing writes to.

    A past that grows may begin empty: what is joined to nothing is itself.
    """
    _Stores(module.graph).run()
    if any(module.graph.find_nodes(op="call_function", target=target) for target in (MARK, NEW)):
        drop_needless_copies(module.graph)


@dataclass
class _Stores:
    """What is known of the tensors of a graph while one goes through it."""

    graph: fx.Graph

    def __post_init__(self) -> None:
        self.contents: dict[fx.Node, Content] = {}
        self.marked: dict[fx.Node, fx.Node] = {}  # tensors whose content is known, as `filled` shows them
        self.checked: dict[tuple[fx.Node, str], fx.Node] = {}
        self.has_past = bool(self.graph.find_nodes(op="call_function", target=READ))
        self.kept: dict[fx.Node, bool] = {}
        self.written: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if writes(node):
                self.written.setdefault(below(inputs(node)[0]), []).append(node)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if is_call(node, aten.cat.default) and self._join(node):
                continue
            try:
                if note_shift(node):
                    self.kept[node] = self._is_kept(below(inputs(node)[0]))
                store = store_of(node) or self._rejoined(node)
                if store is not None:
                    self._store(node, store)
                    continue
            except Refuse as refuse:
                self._forget(below(inputs(node)[0]) if writes(node) else node, refuse.reason)
                if not writes(node):
                    self.kept[node] = self._is_kept(below(inputs(node)[0]))
                continue
            if writes(node):
                target = below(inputs(node)[0])
                self._forget(target, f"`{target.name}` is changed by `{node.name}`, which is no known way to write a cache")
            elif is_call(node, aten.slice.Tensor, aten.narrow.default) and self._read(node):
                continue
            elif is_call(node, aten.clone.default) and below(inputs(node)[0]) in self.contents and not apart(inputs(node)[0])[1]:
                self.contents[node] = self.contents[below(inputs(node)[0])]
            elif is_call(node, MARK, NEW):
                self._note_leaf(node)
            elif node.op == "call_function":
                self._mark_whole_reads(node)

    def _store(self, node: fx.Node, store: Store) -> None:
        """Note what `node` writes."""
        tensor = store.tensor
        known, window, target = self.contents.get(tensor), window_of(node, store), tensor if writes(node) else node
        if target is tensor:
            self._forget(tensor)
        else:
            self.kept[node] = self._is_kept(tensor)
        if not self._is_kept(tensor):
            return
        if window is not None:
            target.meta[WINDOW] = window
            return
        if below(store.source) is tensor:
            raise Refuse(f"`{node.name}` writes a part of `{tensor.name}` to itself", node)
        if store.axis == WHOLE:
            source, parts = apart(store.source)
            if parts or not (source in self.contents or {SHIFTED, WINDOW} & source.meta.keys()):
                raise Refuse(f"`{node.name}` fills `{tensor.name}` with what no known write made", node)
            target.meta |= {name: source.meta[name] for name in (SHIFTED, WINDOW) if name in source.meta}
            if source in self.contents:
                content = self.contents[source]
                self.contents[target] = content
            return
        held = 0 if known is None else val(known.tensor).shape[store.axis]
        start, conditions = store.start, known.conditions if known else ()
        if known and known.axis != store.axis:
            raise Refuse(
                f"`{node.name}` writes along axis {store.axis} of `{tensor.name}`, where tokens stand along {known.axis}", node
            )
        if store.places is not None:
            if known is None and self.has_past:
                raise Refuse(f"`{node.name}` writes at places that an argument says, to a tensor that holds no known past", node)
            start, conditions = held, (*conditions, self._counts_on(node, store.places, known, store))
        if not same(start, held):
            raise Refuse(
                f"`{node.name}` writes to `{tensor.name}` from place {size(start)} on, where {held} are "
                "filled: expected the next one",
                node,
            )
        filled = store.source
        if known is not None:
            with self.graph.inserting_before(node):
                filled = call(self.graph, aten.cat.default, [known.tensor, store.source], store.axis)
            filled.meta["joined"] = True
        self.contents[target] = Content(store.axis, filled, store.spelling, conditions)

    def _is_kept(self, tensor: fx.Node) -> bool:
        """Whether a tensor outlives the forward: an argument or a copy of one, or one that is made of nothing and returned."""
        if tensor not in self.kept:
            source = tensor
            while is_call(source, *COPIES):
                source = inputs(source)[0]
            made = is_call(source, *MADE) and _is_returned(source)
            self.kept[tensor] = source.op == "placeholder" or made or tensor in self.contents
        return self.kept[tensor]

    def _counts_on(self, node: fx.Node, index: fx.Node, known: Content | None, store: Store) -> fx.Node:
        """Whether an index holds the places behind those that are filled."""
        key = index, "" if known is None else str(val(known.tensor).shape[store.axis])
        if key not in self.checked:
            with self.graph.inserting_before(node):
                first: Any = 0
                if known is not None:
                    first = length_of(known.tensor, store.axis)
                count = call(self.graph, aten.sym_size.int, index, 0)
                end = call(self.graph, operator.add, first, count)
                with capture.fake_mode_of([val(index)]):
                    places = call(self.graph, aten.arange.start, first, end, device=val(index).device)
                self.checked[key] = call(self.graph, aten.all.default, call(self.graph, aten.eq.Tensor, index, places))
        return self.checked[key]

    def _read(self, node: fx.Node) -> bool:
        """Replace a read of the filled places; whether it is one."""
        tensor, parts = apart(node)
        content = self.contents.get(tensor)
        if (
            content is None
            or content.conditions
            or len(parts) != 1
            or parts[0] is None
            or not self._is_steady(node, tensor, content)
        ):
            return False
        axis, start, end = parts[0]
        if axis != content.axis or not same(start, 0) or not same(end, val(content.tensor).shape[axis]):
            return False
        content.tensor.meta.setdefault("spelling", content.spelling)
        replace(node, content.tensor)
        return True

    def _mark_whole_reads(self, node: fx.Node) -> None:
        """Let `node` read `filled` in place of tensors whose content is known."""
        for given in node.all_input_nodes:
            tensor, parts = taken_apart(given)
            content = self.contents.get(tensor)
            if content is None or parts or not self._is_steady(node, tensor, content):
                continue
            if tensor not in self.marked:
                with self.graph.inserting_before(node):
                    arguments = (tensor, content.tensor, content.axis, list(content.conditions))
                    self.marked[tensor] = call(self.graph, FILLED, *arguments)
                content.tensor.meta.setdefault("spelling", content.spelling)
            node.replace_input_with(given, self.marked[tensor])

    def _is_steady(self, node: fx.Node, tensor: fx.Node, content: Content) -> bool:
        """Whether nothing is written to a tensor, nor to what filled it, between `node` and what reads it through views."""
        changes = [write for base in (tensor, below(content.tensor)) for write in self.written.get(base, []) if write > node]
        if not changes or viewed(node) is None:
            return True
        first = min(changes)
        return not any(user is first or user > first for user in _readers(node))

    def _note_leaf(self, mark: fx.Node) -> None:
        leaf = inputs(mark)[0]
        tensor, parts = apart(leaf)
        if WINDOW in tensor.meta:
            mark.meta[WINDOW] = tensor.meta[WINDOW]
        content = self.contents.get(tensor)
        if content is not None and not parts and isinstance(val(leaf).shape[content.axis], int):
            mark.meta |= {"leaf": leaf, "capacity": val(leaf).shape[content.axis]}
            mark.update_arg(0, content.tensor)

    def _forget(self, written: fx.Node, reason: str = "") -> None:
        """Nothing is known any more of a tensor that is written to, nor of those that were filled from it."""
        for name in (SHIFTED, WINDOW):
            written.meta.pop(name, None)
        if self._is_kept(written):
            written.meta["unknown"] = reason
        for tensor, content in list(self.contents.items()):
            if written in (below(tensor), below(content.tensor)):
                del self.contents[tensor]
                self.marked.pop(tensor, None)

    def _join(self, cat: fx.Node) -> bool:
        """Replace a `cat` that joins a tensor to nothing; note what one holds that is filled up from the slots held."""
        tensors, axis = whole_cat(cat)
        if len(tensors) == 1 < len(inputs(cat)[0]) and val(tensors[0]).dtype == val(cat).dtype:
            replace(cat, tensors[0])
            return True
        if tensors:
            past, _ = peel(tensors[0])
            if is_call(past, operator.getitem) and is_call(past.args[0], READ) and len(tensors) == 2 and _is_zero(tensors[1]):
                self.contents[cat] = Content(axis, tensors[0], "cat")
        return False

    def _rejoined(self, cat: fx.Node) -> Store | None:
        """What a `cat` writes that puts a tensor together again: its filled places, new ones, and the rest of it."""
        if not is_call(cat, aten.cat.default):
            return None
        tensors, axis = whole_cat(cat)
        if len(tensors) not in (2, 3):
            return None
        *front, rest = tensors
        tensor, parts = apart(rest)
        known = self.contents.get(tensor)
        start = 0 if known is None else val(known.tensor).shape[axis]
        if len(parts) != 1 or parts[0] is None or parts[0].axis != axis or front[:-1] != ([known.tensor] if known else []):
            return None
        if not same(parts[0].start, plus(start, val(front[-1]).shape[axis])):
            return None
        return Store(tensor, axis, start, None, front[-1], "cat")


def _is_zero(tensor: fx.Node) -> bool:
    return is_call(tensor, aten.new_zeros.default, aten.zeros.default, aten.full.default)


def _is_returned(node: fx.Node) -> bool:
    """Whether `node` is returned, after what was written to it in a functional graph."""
    return any(
        is_call(user, MARK, NEW)
        or user.op == "output"
        or (user.target in SPELLINGS and user.args[0] is node and _is_returned(user))
        for user in _readers(node)
    )


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads `node`, also through views."""
    for user in node.users:
        yield user
        if viewed(user) is not None and user.args[0] is node and isinstance(val(user), Tensor):
            yield from _readers(user)
