"""The pipeline id: a name of a pipeline that says what it does to a graph and is safe in file names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ryzen_compile.spec.options import files_by_option
from ryzen_compile.utils.files import hash_file

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass

SOURCE_ID = "source"
"""The id of the empty pipeline: the graph is the source graph."""
MAX_ID_LENGTH = 80
"""The maximum length of an id, in characters of one byte each."""

_DIGEST_LENGTH = 12
_FILE_DIGEST_LENGTH = 8
_EXACT_PASS_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_EXACT_OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*")
_EXACT_VALUE = re.compile(r"[a-z0-9_]+(\.[0-9]+)?")


def pipeline_id(passes: Sequence[Pass]) -> str:
    """Return the id of a pipeline: its passes in order, each with the options that differ from their defaults.

    `fold,attention,precision{to=fp16}` has the id `fold+attention+precision.to-fp16`, and the empty pipeline `source`. An id
    consists of the characters `a-z 0-9 + . - _ ~` and has at most `MAX_ID_LENGTH` of them, so that it is part of a file name
    on every file system. If it does not spell the pipeline exactly, because a value has other characters or the id is too
    long, it ends with `~` and a digest of the pipeline. Different pipelines therefore have different ids, also where case is
    ignored. An option that names a file is spelled, and digested, by the content of the file.
    """
    spelled = [_spell_pass(pass_) for pass_ in passes]
    text = "+".join(part for part, _ in spelled) or SOURCE_ID
    is_exact = all(exact for _, exact in spelled) and len(text) <= MAX_ID_LENGTH and (text != SOURCE_ID or not passes)
    if is_exact:
        return text
    import blake3

    digest = blake3.blake3(pipeline_fingerprint(passes).encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{text[: MAX_ID_LENGTH - _DIGEST_LENGTH - 1].rstrip('+.-')}~{digest}"


def pipeline_fingerprint(passes: Sequence[Pass]) -> str:
    """Return the text of a pipeline in which the content of each file that an option names stands for its path."""
    return ",".join(map(pass_fingerprint, passes)) or "none"


def pass_fingerprint(pass_: Pass) -> str:
    """Return the spec of `pass_`, with a digest of the content in place of the path of each file that an option names."""
    digests = {name: f"sha256:{digest}" for name, digest in _file_digests(pass_).items()}
    return str(dataclasses.replace(pass_, **digests) if digests else pass_)  # type: ignore[type-var]


def option_files(pass_: Pass) -> dict[str, str]:
    """Return the files that the options of `pass_` name: path -> sha256 of the content."""
    return {getattr(pass_, name): digest for name, digest in _file_digests(pass_).items()}


def _file_digests(pass_: Pass) -> dict[str, str]:
    """Return the sha256 of the content of each file that an option names, by field name."""
    return {name: hash_file(path, "sha256") for name, path in files_by_option(pass_).items()}


def _spell_pass(pass_: Pass) -> tuple[str, bool]:
    """Return `name.option-value...`, and whether it spells the pass exactly.

    The spelling can be read back if it is exact: an option starts with a letter after a period, and its value, after the last
    hyphen, has none.
    """
    file_digests = _file_digests(pass_)
    parts, exact = [_replace_unsafe(pass_.name)], _EXACT_PASS_NAME.fullmatch(pass_.name) is not None
    for field in dataclasses.fields(pass_):  # type: ignore[arg-type]
        value, option = getattr(pass_, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if field.name in file_digests:
            text, exact = file_digests[field.name][:_FILE_DIGEST_LENGTH], False
        else:
            text = _spell_value(value)
            exact &= not isinstance(value, (tuple, list)) and _EXACT_VALUE.fullmatch(text) is not None
        exact &= _EXACT_OPTION_NAME.fullmatch(option) is not None
        parts.append(f"{_replace_unsafe(option)}-{_replace_unsafe(text)}")
    return ".".join(parts), exact


def _spell_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "_".join(_replace_unsafe(_spell_value(item)) for item in value)
    return str(value)


def _replace_unsafe(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.replace("%", "pct").lower()).strip("-")
