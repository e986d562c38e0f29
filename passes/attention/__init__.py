"""One file per spelling of attention. Order is priority."""

from kvfx.passes.attention import sdpa

ATTENTION_RULES = (sdpa.RULE,)
