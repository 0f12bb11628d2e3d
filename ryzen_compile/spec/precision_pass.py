"""The interface of passes that convert the precision in which a model computes."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar, Self

from ryzen_compile.spec.passes import Pass

if TYPE_CHECKING:
    from ryzen_compile.spec.dtypes import Precision


class PrecisionPass(Pass):
    """A pass after which a model computes in another precision.

    A build leaves conversions to half precision out of the variants of backends that do not compute in it.
    """

    is_default: ClassVar[bool] = False
    """Whether a build adds the pass for `--fp16` and `--bf16`; of the registered passes, only one does."""

    @property
    @abc.abstractmethod
    def output_precision(self) -> Precision:
        """The precision in which the rewritten model computes."""

    @classmethod
    @abc.abstractmethod
    def with_precision(cls, precision: Precision) -> Self:
        """Return the pass that converts a model to `precision`, with its default options."""
