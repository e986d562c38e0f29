"""One file per spelling of attention. Order is priority.

Beside the rules stand what they are composed of: `logits` (patterns), `reading` (what a match means), `axes`, `operand` and
`equation` (where batch, heads, tokens and channels are), and `waist` (the rewrite).
"""

from kvfx.passes.attention import alibi, eager, einsum, flash, sdpa, sinks, softcap

ATTENTION_RULES = (sdpa.RULE, flash.RULE, eager.RULE, softcap.RULE, sinks.RULE, alibi.RULE, einsum.RULE)
