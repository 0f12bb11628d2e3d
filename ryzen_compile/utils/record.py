"""Records: the frozen, strict data that is written to disk and read back."""

from __future__ import annotations

import datetime

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data with a JSON form. Unknown keys and wrong types are refused on reading."""


def utc_now() -> str:
    """Return the time as records hold it: UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
