"""What compression promises about memory: full caches die layer by layer, and the peak is not above the uncompressed run's."""

from __future__ import annotations

import pytest
from memory import COMPRESSED, FULL, KEPT, LAYERS, PLAIN, WORKING, measure, peaks


@pytest.mark.slow
@pytest.mark.inductor
def test_a_prefill_holds_what_is_kept_and_one_layer_s_working_set():
    rows = measure()
    ours = [row for row in rows if row.run == COMPRESSED]
    assert max(row.kept for row in ours) >= 2 * LAYERS * KEPT  # else the sizes that this test looks for are not those of the run
    assert max(row.full for row in rows if row.run == PLAIN) >= 2 * LAYERS * FULL
    assert all(row.full + row.kept <= 1.05 * (row.kept + WORKING) for row in ours)
    assert peaks(rows, COMPRESSED)[1] <= peaks(rows, PLAIN)[1]
