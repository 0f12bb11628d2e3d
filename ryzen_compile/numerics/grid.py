"""Cases of a comparison: the shapes of every profile, with identical and with mixed rows, or inputs that are run unchanged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from ryzen_compile.data.fixed_values import format_values, with_values
from ryzen_compile.spec.profile import Profile, derive_profile, format_shape

if TYPE_CHECKING:
    from ryzen_compile.data.synthetic import RowMode
    from ryzen_compile.numerics.candidate import Candidate
    from ryzen_compile.spec.interface import Inputs, Interface
    from ryzen_compile.spec.profile import InputShapes


@dataclass(frozen=True, kw_only=True)
class GridCase:
    """One set of inputs and how its rows relate."""

    description: str
    """`opt 8x128, mixed rows`."""
    inputs: Inputs
    row_mode: Literal["identical", "mixed", "given"]
    """Whether the rows of the batch are all the same, all different, or as in the user's data."""
    batch_size: int
    """The number of independent rows; 1 without a batch dimension."""


@dataclass(frozen=True, kw_only=True)
class Cases:
    """The cases of a comparison, which are made again by each iteration; their inputs may be large."""

    make: Callable[[], Iterator[GridCase]]
    sizes: tuple[int, ...]
    """The number of input elements of each case, to which the time that it takes is about proportional."""

    def __iter__(self) -> Iterator[GridCase]:
        return self.make()

    def __len__(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True, kw_only=True)
class CaseSource:
    """What the cases of a comparison are made of: the grid of `profiles`, filled from `samples`, or `inputs`."""

    profiles: Sequence[Profile] = ()
    """Profiles of the grid; empty: those of the candidate, else one derived from the interface."""
    samples: Sequence[Inputs] | None = None
    """Samples that are reshaped to the grid; None: those of the baseline, else of the candidate, else random values."""
    inputs: Sequence[Inputs] | None = None
    """Samples that are run unchanged, in place of the grid."""
    seed: int = 0
    """The seed of random values, at least 0."""

    def bind(self, candidate: Candidate, baseline: Candidate, interface: Interface) -> Cases:
        """Return the cases of the two candidates.

        For a model with branches or loops, they include cases for both values of a bool that determines what runs, and for
        several of an integer, as far as the baseline runs them.
        """
        from ryzen_compile.numerics.branches import control_values, runnable_cases

        if self.inputs is not None:
            sizes = tuple(sum(array.size for array in sample.values()) for sample in self.inputs)
            return Cases(make=partial(cases_from_inputs, interface, self.inputs), sizes=sizes)
        samples = self.samples
        if samples is None:
            make_samples = baseline.samples or candidate.samples
            samples = make_samples(self.seed) if make_samples else ()
        profiles = tuple(self.profiles) or candidate.profiles or (derive_profile(interface),)
        grid = partial(grid_cases, interface, profiles, seed=self.seed, samples=samples)
        sizes = tuple(
            _element_count(shapes)
            for profile in profiles
            for _, shapes in profile.corners()
            for _ in _row_modes(interface, shapes)
        )
        values = control_values(baseline.model_file or candidate.model_file, interface)
        if not values:
            return Cases(make=grid, sizes=sizes)
        added = partial(control_cases, interface, profiles[0], values, seed=self.seed, samples=samples)
        runnable = runnable_cases(added(), baseline)
        return Cases(
            make=lambda: itertools.chain(grid(), (case for case in added() if case.description in runnable)),
            sizes=sizes + (_element_count(profiles[0].opt),) * len(runnable),
        )


def grid_cases(
    interface: Interface, profiles: Sequence[Profile], *, seed: int, samples: Sequence[Inputs] = ()
) -> Iterator[GridCase]:
    """Yield the cases of every profile: min, opt and max; for a batch of several rows, with identical and with mixed rows.

    The values come from `samples`, reshaped to the case; without samples they are random, drawn from `seed`.
    """
    from ryzen_compile.data.reshaping import reshape_samples

    case_count = 0
    for profile_index, profile in enumerate(profiles):
        prefix = f"profile {profile_index + 1} " if len(profiles) > 1 else ""
        corners = profile.corners()
        for corner, shapes in corners:
            batch_size = interface.batch_size(shapes)
            for row_mode in _row_modes(interface, shapes):
                inputs = reshape_samples(samples, interface, shapes, seed=seed + case_count, rows=row_mode)
                case_count += 1
                shape = format_shape(next(iter(shapes.values()), ()))
                description = f"{prefix}{corner if len(corners) > 1 else 'at'} {shape}".rstrip()
                description += f", {row_mode} rows" if batch_size > 1 else ""
                yield GridCase(description=description, inputs=inputs, row_mode=row_mode, batch_size=batch_size)


def _element_count(shapes: InputShapes) -> int:
    return sum(map(math.prod, shapes.values()))


def _row_modes(interface: Interface, shapes: InputShapes) -> tuple[RowMode, ...]:
    """Return how the rows of the cases with `shapes` relate, one for each case."""
    return ("identical", "mixed") if interface.batch_size(shapes) > 1 else ("mixed",)


def control_cases(
    interface: Interface,
    profile: Profile,
    values: Sequence[Mapping[str, int]],
    *,
    seed: int,
    samples: Sequence[Inputs] = (),
) -> Iterator[GridCase]:
    """Yield a case of the optimum of `profile` for each combination in `values`: the value of all elements of some inputs."""
    from ryzen_compile.data.reshaping import reshape_samples

    shapes = profile.opt
    shape, batch_size = format_shape(next(iter(shapes.values()), ())), interface.batch_size(shapes)
    for number, combination in enumerate(values):
        inputs = reshape_samples(samples, interface, shapes, seed=seed + number, rows="mixed")
        inputs = with_values(inputs, combination)
        rows = ", mixed rows" if batch_size > 1 else ""
        description = f"opt {shape}".rstrip() + f"{rows}, {format_values(inputs, combination)}"
        yield GridCase(description=description, inputs=inputs, row_mode="mixed", batch_size=batch_size)


def cases_from_inputs(interface: Interface, inputs: Iterable[Inputs]) -> Iterator[GridCase]:
    """Yield the user's own samples as cases, unchanged."""
    for number, sample in enumerate(inputs, start=1):
        shapes = {name: tuple(array.shape) for name, array in sample.items()}
        shape = format_shape(next(iter(shapes.values()), ()))
        yield GridCase(
            description=f"sample {number} {shape}".rstrip(),
            inputs=sample,
            row_mode="given",
            batch_size=interface.batch_size(shapes),
        )


def select_row(interface: Interface, inputs: Inputs, index: int) -> Inputs:
    """Return row `index` of `inputs` as a batch of 1; inputs without a batch axis are passed on unchanged."""
    row = {}
    for spec in interface.inputs:
        axis = interface.batch_axis(spec)
        array = inputs[spec.name]
        row[spec.name] = array if axis is None else array[(slice(None),) * axis + (slice(index, index + 1),)]
    return row
