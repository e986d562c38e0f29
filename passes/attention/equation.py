"""Which axis is what in the two products of an attention: by place in `matmul` and `bmm`, by letter in `einsum`."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from kvfx.passes.attention.axes import shape_of
from kvfx.passes.graph import val
from kvfx.passes.match import Match
from kvfx.passes.report import Refuse

# Axes in front of the last two, by how many there are in all.
LEADING = {3: "n", 4: "bH", 5: "bhg"}


def product_axes(match: Match) -> tuple[str, str, str]:
    """Axes of the logits, of the query and of the key, as the product of the match has them.

    Raises:
        Refuse: they are not those of attention.
    """
    node, query, key = match["product"], match["query"], match["key"]
    if "equation" in match:
        return _by_letter(match["equation"], query, key, node)
    dims = {val(tensor).dim() for tensor in (query, key, node)}
    if len(dims) != 1 or not dims <= LEADING.keys():
        raise Refuse(f"query has {val(query).dim()} and key {val(key).dim()} axes, expected [B, H, S, D]", node)
    leading = LEADING[val(node).dim()]
    return leading + "st", leading + "sd", leading + "dt"


def value_axes(match: Match, weights: str) -> tuple[str, str]:
    """Axes of the value and of the result, given those of the probabilities.

    Raises:
        Refuse: they are not those of attention.
    """
    node, value = match["attention"], match["value"]
    if "value_equation" in match:
        return _values_by_letter(match["value_equation"], weights, "value_first" in match.tags, node)
    if not weights.endswith("st") or val(value).dim() != len(weights):
        raise Refuse(f"values of shape [{', '.join(shape_of(value))}] are multiplied by probabilities [{', '.join(weights)}]", node)
    return weights[:-2] + "td", weights[:-2] + "sd"


def _by_letter(equation: str, query: fx.Node, key: fx.Node, node: fx.Node) -> tuple[str, str, str]:
    q, k, out = _letters(equation, node)
    shared, only_q = [c for c in out if c in q and c in k], [c for c in out if c in q and c not in k]
    only_k, summed = [c for c in out if c in k and c not in q], [c for c in q if c in k and c not in out]
    whole = len(shared) + len(only_q) + len(only_k) == len(out) and len(only_q) + len(shared) + len(summed) == len(q)
    if not whole or (len(shared), len(only_k), len(summed)) != (2, 1, 1) or len(only_q) not in (1, 2):
        raise Refuse(f"einsum `{equation}` is no product of queries and keys by batch and head", node)
    batch, heads = shared
    if not all(text.index(batch) < text.index(heads) for text in (q, k)):
        raise Refuse(f"einsum `{equation}` does not tell which of `{batch}` and `{heads}` is the batch", node)
    sizes = dict(zip(q, val(query).shape, strict=True)) | dict(zip(k, val(key).shape, strict=True))
    asking = only_q[0] if len(only_q) == 1 else _asking(only_q, out, heads, only_k[0], sizes, equation, node)
    roles = {batch: "b", heads: "h" if len(only_q) == 2 else "H", asking: "s", only_k[0]: "t", summed[0]: "d"}
    roles |= {letter: "g" for letter in only_q if letter != asking}
    of_q, of_k, of_out = ("".join(roles[letter] for letter in text) for text in (q, k, out))
    return of_out, of_q, of_k


def _asking(letters: list[str], out: str, heads: str, keys: str, sizes: dict[str, Any], equation: str, node: fx.Node) -> str:
    """Which of two letters counts queries; the other counts the heads of a group."""
    growing = [letter for letter in letters if not isinstance(sizes[letter], int)]
    if len(growing) == 1:
        return growing[0]
    # Heads of a group usually stand behind their KV head, and queries in front of keys.
    if out.find(heads + letters[0]) >= 0 and out.find(letters[1] + keys) >= 0:
        return letters[1]
    if out.find(heads + letters[1]) >= 0 and out.find(letters[0] + keys) >= 0:
        return letters[0]
    raise Refuse(f"einsum `{equation}` does not tell which of `{letters[0]}` and `{letters[1]}` counts queries", node)


def _values_by_letter(equation: str, weights: str, is_value_first: bool, node: fx.Node) -> tuple[str, str]:
    first, second, out = _letters(equation, node)
    w, v = (second, first) if is_value_first else (first, second)
    roles = dict(zip(w, weights, strict=False))
    new = [letter for letter in v if letter not in roles]
    if len(w) != len(weights) or len(new) != 1:
        raise Refuse(f"einsum `{equation}` is no product of probabilities [{', '.join(weights)}] and values", node)
    roles[new[0]] = "d"
    of_v, of_out = ("".join(roles[letter] for letter in text) for text in (v, out))
    if sorted(of_v) != sorted({*weights, "d"} - {"s", "g"}) or sorted(of_out) != sorted({*weights, "d"} - {"t"}):
        raise Refuse(f"einsum `{equation}` does not sum values over the axis of keys alone", node)
    return of_v, of_out


def _letters(equation: str, node: fx.Node) -> tuple[str, str, str]:
    parts = re.fullmatch(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)", equation.replace(" ", ""))
    if parts is None or any(len({*part}) != len(part) for part in parts.groups()):
        raise Refuse(f"einsum `{equation}`, expected two operands, a result, and each axis by a letter of its own", node)
    first, second, out = parts.groups()
    return first, second, out
