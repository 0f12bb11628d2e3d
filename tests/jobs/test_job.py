"""Tests of jobs: keys with one part per field, and the JSON form with which another process runs a job."""

from __future__ import annotations

from typing import ClassVar

import pytest
from support.text_jobs import UpperCaseJob, UpperCaseKey

from ryzen_compile.errors import RyzenError
from ryzen_compile.jobs.job import JobKey, Resources, decode_job, encode_job
from ryzen_compile.utils.record import Record


class Settings(Record, frozen=True):
    level: int
    scale: float = 1.0
    name: str | None = None


class NestedKey(JobKey, frozen=True):
    kind: ClassVar[str] = "nested"

    settings: Settings
    options: dict[str, str | int | list[str]] = {}
    targets: tuple[str, ...] = ()


def test_a_key_has_one_part_per_leaf_field() -> None:
    key = NestedKey(settings=Settings(level=3), options={"refit": "on", "formats": ["a", "b"]}, targets=("sm86", "sm89"))
    assert key.cache_key.kind == "nested"
    assert key.cache_key.parts == {
        "settings.level": "3",
        "settings.scale": "1.0",
        "options.refit": "on",
        "options.formats": '["a","b"]',
        "targets": '["sm86","sm89"]',
    }


def test_equal_keys_have_equal_digests() -> None:
    first, second = (NestedKey(settings=Settings(level=1, scale=scale)) for scale in (2.0, 2))
    assert first == second
    assert first.cache_key.digest == second.cache_key.digest


def test_every_field_and_the_kind_change_the_digest() -> None:
    class OtherKey(NestedKey, frozen=True):
        kind: ClassVar[str] = "other"

    keys: list[JobKey] = [
        NestedKey(settings=Settings(level=1)),
        NestedKey(settings=Settings(level=2)),
        NestedKey(settings=Settings(level=1, name="")),
        NestedKey(settings=Settings(level=1), options={"name": "x"}),
        NestedKey(settings=Settings(level=1), targets=("a",)),
        OtherKey(settings=Settings(level=1)),
    ]
    assert len({key.cache_key.digest for key in keys}) == len(keys)


def test_a_job_survives_its_json_form() -> None:
    job = UpperCaseJob(
        key=UpperCaseKey(text="0" * 64),
        inputs={"in.txt": "0" * 64},
        resources=Resources(memory_bytes=10, seconds=1.5, gpu=89),
        source="in.txt",
        output="out.txt",
    )
    assert decode_job(encode_job(job)) == job
    assert decode_job(encode_job(job)).cacheable


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"type":"NoSuchJob"}', "no function runs jobs of type `NoSuchJob`"),
        (b'{"type":"UpperCaseJob"}', "this is not a job"),
        (b'{"type":"UpperCaseJob","key":{"text":"a"},"source":"a","output":"b","extra":1}', "this is not a job"),
        (b"[]", "this is not a job"),
        (b"\xff", "this is not a job"),
    ],
)
def test_data_that_is_no_job_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(RyzenError, match=message):
        decode_job(data)
