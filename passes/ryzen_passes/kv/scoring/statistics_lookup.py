"""Find the statistics file that a cache specification refers to: the specification records its name and digest, no folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ryzen_compile.errors import ModelError
from ryzen_compile.spec.kv_cache import StatisticsRef
from ryzen_compile.utils.files import hash_file

_HINT = "give the file that `calibrate` wrote: --statistics FILE, or put it beside the model"


def find_statistics(reference: StatisticsRef, locations: Sequence[Path]) -> Path:
    """Return the first file with the digest of `reference` among `locations`.

    A location is a file of any name, or a folder, in which the file has the recorded name. Raises ModelError if no file has
    the digest.
    """
    candidates = [location / reference.file_name if location.is_dir() else location for location in locations]
    files = [path for path in candidates if path.is_file()]
    for path in files:
        if hash_file(path, "sha256") == reference.sha256:
            return path
    problem = f"the statistics `{reference.file_name}` (sha256 {reference.sha256[:12]}...) that the graph was rewritten with"
    if files:
        raise ModelError(f"`{files[0].name}` differs from {problem}", hint=_HINT)
    raise ModelError(f"{problem} are not found", hint=_HINT)
