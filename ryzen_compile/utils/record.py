"""Records: immutable data classes that are written to disk as JSON and validated when read."""

from __future__ import annotations

import datetime

import msgspec


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base class of data with a JSON form. Unknown keys and wrong types raise an error on reading."""


def utc_now() -> str:
    """Return the current time in the format of records: UTC, ISO 8601, with a resolution of one second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
