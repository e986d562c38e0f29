"""Report: what the passes found, what they did, and why they left something alone. Plain data, printed or read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import fx


class Refuse(Exception):
    """Raised by a guard: this site is not understood. Never leaves the passes."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


class LayersFail(Exception):
    """Raised when something cannot be done in some layers; `layers` says why, by layer. Leaves the passes."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__("; ".join(f"layer {layer}: {reason}" for layer, reason in layers.items()))
        self.layers = layers


class Stranded(LayersFail):
    """The slots of layers that evicted cannot be given to what reads them."""


class Unscored(LayersFail):
    """The new tokens of layers cannot be scored, and their cache asks for scores: no attention is understood that reads them."""


class Unstored(LayersFail):
    """Raised where a decoder returns, as keys or values of a layer, what is not understood as those of its new tokens."""


class NoKernel(Exception):
    """Triton kernels were asked for, and one cannot run; says which, and why. Leaves the passes."""


@dataclass(frozen=True)
class Refusal:
    """A place that looked like attention and was left exactly as it was.

    Attributes:
        rule: what refused it: an attention rule, or a pass.
        reason: why.
        node: the place in the graph.
        source: file and line of the rule's pattern.
        nearest: how far the nearest pattern fitted, where none fitted whole.
        where: module, file and line of the place in the model; see `passes.where`.
    """

    rule: str
    reason: str
    node: str
    source: str = ""
    nearest: str = ""
    where: str = ""

    def __str__(self) -> str:
        return f"{self.node} ({self.rule}): {self.reason}" + (f"; nearest: {self.nearest}" if self.nearest else "")


@dataclass
class Site:
    """One attention in one layer. The nodes live only while the passes run.

    Attributes:
        rule: the spelling that was found, and `spelling`, a variant of it.
        index: which attention of the graph it is.
        layer: the cache layer that it stores to, or None.
        window: how many tokens back a query of a sliding-window layer sees; None for all.
        cache: how new keys join the cache; empty where nothing was found.
        taps: tensors that the score reads.
        score: the ops that score, or empty.
        unseen: what changes the weights of this attention and is left out where its score computes weights of its own.
        lowering: what runs the ops: "triton" or "reference", or which of both.
        refusal: why the site was left whole.
        where: module, file and line in the model; see `passes.where`.
    """

    rule: str
    index: int
    heads: int
    kv_heads: int
    head_dim: int
    spelling: str = ""
    layer: int | None = None
    window: int | None = None
    cache: str = ""
    taps: tuple[str, ...] = ()
    score: str = ""
    unseen: tuple[str, ...] = ()
    lowering: str = ""
    refusal: str = ""
    where: str = ""
    nodes: dict[str, fx.Node] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """How messages call the site."""
        return f"layer {self.layer}" if self.layer is not None else f"attention {self.index}"

    def as_dict(self) -> dict[str, Any]:
        """The site without its nodes."""
        return {name: value for name, value in asdict(self).items() if name != "nodes"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        return Site(**self.as_dict())


@dataclass
class Report:
    """What happened to one graph.

    Attributes:
        sites: attention sites in graph order, each compressed, merely found, or refused with its reason.
        refusals: nodes that a rule's pattern nearly described.
        layers: cache layers that the graph writes under a plan, those of sliding windows left out.
        whole: those of them that no attention understood by the rules reads.
        counts_columns: whether attention behind a cache adds a bias per head, which counts the columns of padding too.
        narrowed: of an exported program, sizes of inputs that may vary less than before, one line each.
        leftovers: op counts worth knowing when no site was found, e.g. softmax calls.
        lowered: of each op that has a Triton kernel, "triton", or why its reference runs.
        seconds: time spent in each pass.
        traces: of kernel ops, by op and arguments, while the passes run (see `traced_op`).
    """

    sites: list[Site] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    layers: int = 0
    whole: tuple[int, ...] = ()
    counts_columns: bool = False
    narrowed: tuple[str, ...] = ()
    leftovers: dict[str, int] = field(default_factory=dict)
    lowered: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    traces: dict[Any, fx.Graph] = field(default_factory=dict, repr=False, compare=False)

    @property
    def compressed(self) -> list[Site]:
        """Sites whose cache write keeps only what the score chose."""
        return [site for site in self.sites if site.score and not site.refusal]

    @property
    def coverage(self) -> float:
        """Compressed share of the cache layers that this graph writes, in [0, 1]."""
        return len(self.compressed) / self.layers if self.layers else 0.0

    def reasons(self) -> list[str]:
        """Why places were left alone, one line each."""
        refused = [f"{site.name} ({site.rule}): {site.refusal}" for site in self.sites if site.refusal]
        return refused + [str(refusal) for refusal in self.refusals]

    def forget_nodes(self) -> None:
        """Let go of the graph."""
        for site in self.sites:
            site.nodes = {}
        self.traces = {}
