"""Numbers of examples of property-based tests, by the profile in HYPOTHESIS_PROFILE."""

from __future__ import annotations

import os

FACTORS = {"steady": 1, "deep": 2, "search": 20}
"""Profile -> how many times as many examples it draws as `make test`: `deep` in `make test-all`, `search` with new seeds."""

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "steady")


def examples(count: int) -> int:
    """Return the number of examples that a test draws in this profile, if it draws `count` in `make test`."""
    return count * FACTORS[PROFILE]
