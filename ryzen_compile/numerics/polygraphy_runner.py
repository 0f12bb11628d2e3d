"""Polygraphy runners for candidates: several candidates run side by side, one case at a time."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from polygraphy import config
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from ryzen_compile.data.sequences import flatten_sequences
from ryzen_compile.errors import RyzenError
from ryzen_compile.numerics.candidate import Candidate
from ryzen_compile.numerics.grid import GridCase
from ryzen_compile.processes.operation import performing
from ryzen_compile.spec.profile import format_shapes

if TYPE_CHECKING:
    from ryzen_compile.spec.interface import Inputs, Outputs, RunFunction


class CandidateRunner(BaseRunner):  # type: ignore[misc]
    """A candidate as a Polygraphy runner.

    Polygraphy matches inputs by similar names, casts and reshapes them to the declared metadata. To prevent that, the runner
    declares the inputs exactly as the first case has them; the candidate itself casts between floating-point types.
    """

    def __init__(self, candidate: Candidate) -> None:
        super().__init__(name=candidate.description)
        self.first_inputs: Inputs = {}
        """The inputs of the first case."""
        self.outputs: Outputs = {}
        """The outputs of the latest case. Polygraphy receives none: it formats the type and shape of each for its log, 0.05 ms
        an output, even while the log is off."""
        self._candidate = candidate
        self._resources = ExitStack()
        self._run: RunFunction | None = None

    def activate_impl(self) -> None:
        """Open the candidate."""
        with performing(f"loading {self.name}"):
            self._run = self._resources.enter_context(self._candidate.open())

    def deactivate_impl(self) -> None:
        """Release the candidate."""
        self._run, self.outputs = None, {}
        self._resources.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return the metadata of the inputs of the first case, with dynamic sizes."""
        metadata = TensorMetadata()
        for name, array in self.first_inputs.items():
            metadata.add(name, array.dtype, [None] * array.ndim)
        return metadata

    def infer_impl(self, feed_dict: Inputs) -> Outputs:
        """Run once, and record the outputs and the time."""
        started = time.perf_counter()
        self.outputs = self.run(feed_dict)
        self.inference_time = time.perf_counter() - started
        return {}

    def run(self, inputs: Inputs) -> Outputs:
        """Run once, outside of Polygraphy's loop; raises RuntimeError if the runner is not active."""
        if self._run is None:
            raise RuntimeError(f"{self.name} is not active")
        with performing(f"running {self.name}, on {format_shapes(inputs)}"):
            return flatten_sequences(self._run(inputs))


def _strings_as_objects(inputs: Inputs) -> Inputs:
    """Return inputs with strings as objects: NumPy has one type per string length, and Polygraphy would cast between them."""
    return {name: array.astype(object) if array.dtype.kind in "UST" else array for name, array in inputs.items()}


@contextmanager
def _disable_array_swap() -> Iterator[None]:
    """Prevent Polygraphy from summing output sizes, for which it imports torch (2 s and its memory).

    With a negative threshold Polygraphy sums the sizes and never swaps arrays to disk; with a very large one it does neither.
    """
    previous = config.ARRAY_SWAP_THRESHOLD_MB
    config.ARRAY_SWAP_THRESHOLD_MB = 1 << 40
    try:
        yield
    finally:
        config.ARRAY_SWAP_THRESHOLD_MB = previous


def run_cases(runners: list[CandidateRunner], cases: Iterable[GridCase]) -> Generator[tuple[GridCase, list[Outputs]]]:
    """Run every case on all runners through `Comparator.run` and yield it with the outputs of each, one case at a time.

    The runners are active during the iteration. Polygraphy's logger is silenced meanwhile and restored afterwards. Raises
    RyzenError if Polygraphy fails.
    """
    remaining = iter(cases)
    current = next(remaining, None)
    if current is None:
        return
    for runner in runners:
        runner.first_inputs = _strings_as_objects(current.inputs)

    def case_inputs() -> Iterator[Inputs]:
        nonlocal current
        while current is not None:
            yield _strings_as_objects(current.inputs)
            current = next(remaining, None)

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), _disable_array_swap():
        stream = Comparator.run(runners, case_inputs(), streaming=True)
        try:
            for _ in stream:
                yield current, [runner.outputs for runner in runners]
        except PolygraphyException as error:
            raise RyzenError(f"Polygraphy cannot run the comparison: {error}") from error
        finally:
            stream.close()
