"""The one tolerance of the tests: an answer may err as much as plain arithmetic of its precision errs."""

import torch
from torch import Tensor


def assert_within_rounding(actual: Tensor, low: Tensor, exact: Tensor, factor: float = 4, ulps: float = 16) -> None:
    """Assert that actual is as close to exact as straightforward arithmetic in low precision is.

    Args:
        actual: the answer under test, any shape.
        low: the same quantity from a straightforward evaluation in the precision that actual computes in.
        exact: the same quantity in float64.
        factor: how many times low's largest error actual may show; orders of summation differ.
        ulps: units in the last place of the largest exact magnitude granted on top; low may be right by luck.
    """
    assert actual.shape == low.shape == exact.shape
    assert exact.dtype == torch.float64
    assert torch.equal(actual.isfinite(), exact.isfinite())
    assert torch.equal(actual[~exact.isfinite()].double(), exact[~exact.isfinite()])
    finite = exact.isfinite()
    if not finite.any():
        return
    actual, low, exact = actual[finite].double(), low[finite].double(), exact[finite]
    allowed = factor * (low - exact).abs().max() + ulps * torch.finfo(torch.float32).eps * exact.abs().max()
    error = (actual - exact).abs().max()
    assert error <= allowed, f"error {error:.3e}, rounding explains {allowed:.3e}"
