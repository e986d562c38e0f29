"""Score by what the output projection makes of the value."""

import torch
from torch import Tensor

from .op import KernelOp, samples


def value_projection(value: Tensor, weight: Tensor, valid: Tensor | None) -> Tensor:
    """Score each token by the L1 norm of its value behind the output projection, mean over the heads of the group.

    A token attended to with weight a adds a * W_h v to the layer's output through query head h; the norm bounds what
    its loss can change. CriticalKV (Feng et al., arXiv:2502.03805). A bias of the projection takes no part: it does
    not depend on v.

    Args:
        value: [B, Hkv, S, Dv], any float dtype and strides.
        weight: [hidden, Hq*Dv] of the output projection; query head h*G + g reads channels (h*G + g)*Dv onwards and
            belongs to KV head h.
        valid: [B, S] bool, False at padding; None means every token is real.

    Returns:
        Scores, [B, Hkv, S] float32, not negative, higher = keep; 0 at padding.

    Numerics: products in the dtype of `weight`, as in the projection itself; absolute values are summed in float32.
    Cost: 2*B*Hq*S*Dv*hidden flops, as much as the projection itself. Query heads take turns, so that scratch is one
    [B, S, hidden] and not Hq of them.
    """
    groups, width = value.shape[1], value.shape[3]
    value = value.to(weight.dtype)
    heads = weight.unflatten(1, (groups, -1, width))  # [hidden, Hkv, G, Dv]
    norms = [_mean_norm(value[:, group], heads[:, group]) for group in range(groups)]
    score = torch.stack(norms, 1)
    return score if valid is None else score.masked_fill(~valid[:, None], 0)


def _mean_norm(value: Tensor, heads: Tensor) -> Tensor:
    """Average the L1 norms of value, [B, S, Dv], behind each of the heads, [hidden, G, Dv]: [B, S] float32."""
    projected = (value @ head.t() for head in heads.unbind(1))
    return sum(torch.linalg.vector_norm(x, 1, dim=-1, dtype=torch.float32) for x in projected) / heads.shape[1]


def _inputs(dims, dtype, device, seed):
    B, H, G, S, D = dims
    return *samples(dtype, device, seed, (B, H, S, D), (40, H * G * D)), None


OP = KernelOp(
    "value_projection",
    "(Tensor value, Tensor weight, Tensor? valid) -> Tensor",
    value_projection,
    _inputs,
    cost="2*B*Hq*S*D*hidden flops",
)
