"""How sure a share is of which only some cases were seen."""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist


def wilson(hits: int, cases: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share: where the true one lies if the cases were drawn independently.

    Unlike the usual one it stays within [0, 1] and has a width where none or all of the cases are hits.

    Args:
        hits: cases that hold, 0 to `cases`.
        cases: at least one.
        level: of confidence, between 0 and 1.

    Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    if not 0 <= hits <= cases or cases < 1:
        raise ValueError(f"{hits} hits of {cases} cases; expected 0 <= hits <= cases and one case at least")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = hits / cases, z * z / cases
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / cases + spread / (4 * cases)) / (1 + spread)
    # At the ends the formula is exactly 0 and 1, which floats miss.
    return (0.0 if hits == 0 else middle - half, 1.0 if hits == cases else middle + half)
