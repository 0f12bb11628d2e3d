"""Polygraphy: subjects as its runners, run side by side, one case at a time."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from polygraphy import config
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from ryzen_compile.errors import RyzenError
from ryzen_compile.numerics.candidate import Run, Subject
from ryzen_compile.numerics.grid import Case

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Feed


class SubjectRunner(BaseRunner):  # type: ignore[misc]
    """A subject as Polygraphy runs it.

    Polygraphy would match inputs by similar names, cast and reshape them until they fit. To leave it nothing to guess, the
    runner states the inputs as the first feed has them; the subject itself converts between floating-point types.
    """

    def __init__(self, subject: Subject) -> None:
        super().__init__(name=subject.executed)
        self.first: Feed = {}
        """The first feed that will come."""
        self._subject = subject
        self._resources = ExitStack()
        self._run: Run | None = None

    def activate_impl(self) -> None:
        """Open the subject."""
        self._run = self._resources.enter_context(self._subject.open())

    def deactivate_impl(self) -> None:
        """Let go of the subject."""
        self._run = None
        self._resources.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return the inputs as they will be fed."""
        metadata = TensorMetadata()
        for name, array in self.first.items():
            metadata.add(name, array.dtype, [None] * array.ndim)
        return metadata

    def infer_impl(self, feed_dict: Feed) -> Feed:
        """Run once."""
        started = time.perf_counter()
        outputs = self.run(feed_dict)
        self.inference_time = time.perf_counter() - started
        return outputs

    def run(self, feed: Feed) -> Feed:
        """Run once, outside of Polygraphy's loop; the runner must be active."""
        if self._run is None:
            raise RuntimeError(f"{self.name} is not active")
        return dict(_arrays(self._run(feed)))


def _spelt_out(feed: Feed) -> Feed:
    """Return a feed with its strings as objects: numpy has a type for each length, and Polygraphy would cast between them."""
    return {name: array.astype(object) if array.dtype.kind in "UST" else array for name, array in feed.items()}


def _arrays(outputs: Feed) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of outputs: elements of a sequence are called `name[0]`, `name[1]`, ...; what is absent is left out."""
    import numpy as np

    for name, value in outputs.items():
        if isinstance(value, (list, tuple)):
            yield from _arrays({f"{name}[{at}]": element for at, element in enumerate(value)})
        elif value is not None:
            yield name, np.asarray(value)


@contextmanager
def _arrays_in_memory() -> Iterator[None]:
    """Keep Polygraphy from adding up the sizes of outputs, for which it would import torch: 2 s, and memory for nothing.

    It does so where arrays may never be swapped to the disk; with a threshold out of reach it neither adds nor swaps.
    """
    before = config.ARRAY_SWAP_THRESHOLD_MB
    config.ARRAY_SWAP_THRESHOLD_MB = 1 << 40
    try:
        yield
    finally:
        config.ARRAY_SWAP_THRESHOLD_MB = before


def side_by_side(runners: list[SubjectRunner], cases: Iterable[Case]) -> Generator[tuple[Case, list[dict[str, Any]]]]:
    """Run every case on all runners and yield it with their outputs, one case at a time, through `Comparator.run`.

    The runners are active while the iteration lasts. Polygraphy says nothing meanwhile, and its logger is afterwards as it was.
    """
    coming = iter(cases)
    current = next(coming, None)
    if current is None:
        return
    for runner in runners:
        runner.first = _spelt_out(current.feed)

    def feeds() -> Iterator[Feed]:
        nonlocal current
        while current is not None:
            yield _spelt_out(current.feed)
            current = next(coming, None)

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), _arrays_in_memory():
        stream = Comparator.run(runners, feeds(), streaming=True)
        try:
            for results in stream:
                yield current, [dict(iterations[0].items()) for _, iterations in results.items()]
        except PolygraphyException as error:
            raise RyzenError(f"Polygraphy cannot run the comparison: {error}") from error
        finally:
            stream.close()
