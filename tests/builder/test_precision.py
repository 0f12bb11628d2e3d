"""Precision of a build: the pass is found by what it does, not by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import pytest
from support import fake_passes

from ryzen_compile import registry
from ryzen_compile.builder.default_pipelines import pipeline_for
from ryzen_compile.errors import UsageError
from ryzen_compile.spec.dtypes import Precision
from ryzen_compile.spec.passes import Pass
from ryzen_compile.spec.precision_pass import PrecisionPass
from ryzen_passes.fold import Fold


class AlwaysHalf(fake_passes.ReplaceOpType, PrecisionPass):
    """A precision pass of another package, with another name and no option for the precision."""

    is_default: ClassVar[bool] = True

    @property
    def output_precision(self) -> Precision:
        return "fp16"

    @classmethod
    def with_precision(cls, precision: Precision) -> Self:
        assert precision == "fp16"
        return cls()


class OtherHalf(AlwaysHalf):
    """A second one."""


class OptionalHalf(AlwaysHalf):
    """A precision pass that a build does not add by itself."""

    is_default: ClassVar[bool] = False


def register(monkeypatch: pytest.MonkeyPatch, **passes: type[Pass]) -> None:
    by_name: Mapping[str, type[Pass]] = {cls.name: cls for cls in passes.values()}
    monkeypatch.setattr(registry, "passes", lambda: by_name)
    monkeypatch.setattr(registry, "find_pass", lambda name: by_name[name])


def test_the_requested_precision_adds_the_registered_pass() -> None:
    pipeline = pipeline_for("tensorrt-rtx", passes="fold", precision="bf16", source_half_precision=None)
    assert (pipeline.precision, pipeline.id) == ("bf16", "fold+precision.to-bf16")
    portable = pipeline_for("onnxruntime", passes="fold", precision="bf16", source_half_precision=None)
    assert (portable.precision, portable.id) == ("fp32", "fold")
    assert [str(note) for note in portable.diagnostics] == [
        "`precision{to=bf16}` is left out: the portable variant never uses half precision"
    ]


def test_a_precision_pass_of_any_name_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, fold=Fold, half=AlwaysHalf)
    for passes, precision in (("fold", "fp16"), ("fold,always-half", None), ("fold,always-half", "bf16")):
        requested: Precision | None = precision  # type: ignore[assignment]
        pipeline = pipeline_for("tensorrt-rtx", passes=passes, precision=requested, source_half_precision=None)
        assert (pipeline.precision, pipeline.id) == ("fp16", "fold+always-half")
        portable = pipeline_for("onnxruntime", passes=passes, precision=requested, source_half_precision=None)
        assert (portable.precision, portable.id) == ("fp32", "fold")


@pytest.mark.parametrize(
    ("passes", "message", "hint"),
    [
        ({"fold": Fold}, "no pass is the default", "name a pass in --passes"),
        ({"half": AlwaysHalf, "other": OtherHalf}, "several passes are the default", "always-half, other-half"),
    ],
)
def test_the_default_precision_pass_must_be_the_only_one(
    passes: dict[str, type[Pass]], message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, **passes)
    with pytest.raises(UsageError, match=message) as caught:
        registry.find_precision_pass()
    assert hint in str(caught.value.hint)


def test_a_precision_pass_that_is_not_the_default_does_not_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, half=AlwaysHalf, optional=OptionalHalf)
    assert registry.find_precision_pass() is AlwaysHalf
