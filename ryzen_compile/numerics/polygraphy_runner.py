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
from ryzen_compile.numerics.candidate import Candidate, RunFunction
from ryzen_compile.numerics.grid import GridCase

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Inputs


class CandidateRunner(BaseRunner):  # type: ignore[misc]
    """A subject as Polygraphy runs it.

    Polygraphy would match inputs by similar names, cast and reshape them until they fit. To leave it nothing to guess, the
    runner states the inputs as the first feed has them; the subject itself converts between floating-point types.
    """

    def __init__(self, candidate: Candidate) -> None:
        super().__init__(name=candidate.description)
        self.first_inputs: Inputs = {}
        """The first feed that will come."""
        self._candidate = candidate
        self._resources = ExitStack()
        self._run: RunFunction | None = None

    def activate_impl(self) -> None:
        """Open the subject."""
        self._run = self._resources.enter_context(self._candidate.open())

    def deactivate_impl(self) -> None:
        """Let go of the subject."""
        self._run = None
        self._resources.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return the inputs as they will be fed."""
        metadata = TensorMetadata()
        for name, array in self.first_inputs.items():
            metadata.add(name, array.dtype, [None] * array.ndim)
        return metadata

    def infer_impl(self, feed_dict: Inputs) -> Inputs:
        """Run once."""
        started = time.perf_counter()
        outputs = self.run(feed_dict)
        self.inference_time = time.perf_counter() - started
        return outputs

    def run(self, inputs: Inputs) -> Inputs:
        """Run once, outside of Polygraphy's loop; the runner must be active."""
        if self._run is None:
            raise RuntimeError(f"{self.name} is not active")
        return dict(_flatten_outputs(self._run(inputs)))


def _strings_as_objects(inputs: Inputs) -> Inputs:
    """Return a feed with its strings as objects: numpy has a type for each length, and Polygraphy would cast between them."""
    return {name: array.astype(object) if array.dtype.kind in "UST" else array for name, array in inputs.items()}


def _flatten_outputs(outputs: Inputs) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of outputs: elements of a sequence are called `name[0]`, `name[1]`, ...; what is absent is left out."""
    import numpy as np

    for name, value in outputs.items():
        if isinstance(value, (list, tuple)):
            yield from _flatten_outputs({f"{name}[{at}]": element for at, element in enumerate(value)})
        elif value is not None:
            yield name, np.asarray(value)


@contextmanager
def _disable_array_swap() -> Iterator[None]:
    """Keep Polygraphy from adding up the sizes of outputs, for which it would import torch: 2 s, and memory for nothing.

    It does so where arrays may never be swapped to the disk; with a threshold out of reach it neither adds nor swaps.
    """
    before = config.ARRAY_SWAP_THRESHOLD_MB
    config.ARRAY_SWAP_THRESHOLD_MB = 1 << 40
    try:
        yield
    finally:
        config.ARRAY_SWAP_THRESHOLD_MB = before


def run_cases(runners: list[CandidateRunner], cases: Iterable[GridCase]) -> Generator[tuple[GridCase, list[dict[str, Any]]]]:
    """Run every case on all runners and yield it with their outputs, one case at a time, through `Comparator.run`.

    The runners are active while the iteration lasts. Polygraphy says nothing meanwhile, and its logger is afterwards as it was.
    """
    coming = iter(cases)
    current = next(coming, None)
    if current is None:
        return
    for runner in runners:
        runner.first_inputs = _strings_as_objects(current.inputs)

    def feeds() -> Iterator[Inputs]:
        nonlocal current
        while current is not None:
            yield _strings_as_objects(current.inputs)
            current = next(coming, None)

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), _disable_array_swap():
        stream = Comparator.run(runners, feeds(), streaming=True)
        try:
            for results in stream:
                yield current, [dict(iterations[0].items()) for _, iterations in results.items()]
        except PolygraphyException as error:
            raise RyzenError(f"Polygraphy cannot run the comparison: {error}") from error
        finally:
            stream.close()
