"""Numbers of examples of property-based tests that do not draw Hypothesis's own number, by profile."""

from __future__ import annotations

import os

FACTORS = {"steady": 1, "deep": 2, "search": 20}
"""The profile in HYPOTHESIS_PROFILE, `steady` by default -> how many times as many examples a test draws as in `make test`:
`deep` in `make test-all`, `search` in `make test-search`, with new seeds. Other profiles draw as many."""

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "steady")


def examples(count: int) -> int:
    """Return the number of examples that a test draws in this profile, if it draws `count` in `make test`."""
    return count * FACTORS.get(PROFILE, 1)
