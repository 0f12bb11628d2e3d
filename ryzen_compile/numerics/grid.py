"""The grid of cases that a comparison runs: every profile's corners, with identical and with mixed rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ryzen_compile.spec.profile import Profile, Shapes, format_shape

if TYPE_CHECKING:
    from ryzen_compile.data.synthetic import RowMode
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.passes import Inputs


@dataclass(frozen=True, kw_only=True)
class GridCase:
    """One feed, and what it is there to show."""

    description: str
    """`opt 8x128, mixed rows`."""
    inputs: Inputs
    row_mode: Literal["identical", "mixed", "given"]
    """Whether the rows of the batch are all the same, all different, or as the user's data has them."""
    batch_size: int
    """How many rows are independent of each other; 1 where none are."""


def grid_cases(
    interface: Interface, profiles: Sequence[Profile], *, seed: int, samples: Sequence[Inputs] = ()
) -> Iterator[GridCase]:
    """Yield the cases of every profile: min, opt and max; where there are several rows, identical and mixed ones.

    The values are those of `samples`, brought to the shapes of the case, and seeded ones where there are no samples.
    """
    from ryzen_compile.data.reshaping import reshape_samples

    number = 0
    for at, profile in enumerate(profiles):
        which = f"profile {at + 1} " if len(profiles) > 1 else ""
        corners = profile.corners()
        for corner, shapes in corners:
            batch = _batch_size(interface, shapes)
            both: tuple[RowMode, ...] = ("identical", "mixed") if batch > 1 else ("mixed",)
            for rows in both:
                feed = reshape_samples(samples, interface, shapes, seed=seed + number, rows=rows)
                number += 1
                says = f"{which}{corner if len(corners) > 1 else 'at'} {format_shape(next(iter(shapes.values()), ()))}".rstrip()
                says += f", {rows} rows" if batch > 1 else ""
                yield GridCase(description=says, inputs=feed, row_mode=rows, batch_size=batch)


def cases_from_inputs(interface: Interface, inputs: Iterable[Inputs]) -> Iterator[GridCase]:
    """Yield the user's own feeds as cases."""
    for number, feed in enumerate(inputs):
        shapes = {name: tuple(array.shape) for name, array in feed.items()}
        spelt = format_shape(next(iter(shapes.values()), ()))
        yield GridCase(
            description=f"sample {number + 1} {spelt}".rstrip(),
            inputs=feed,
            row_mode="given",
            batch_size=_batch_size(interface, shapes),
        )


def select_row(interface: Interface, inputs: Inputs, index: int) -> Inputs:
    """Return row `at` of a feed as a batch of one."""
    one = {}
    for spec in interface.inputs:
        axis = interface.batch_axis(spec)
        array = inputs[spec.name]
        one[spec.name] = array if axis is None else array[(slice(None),) * axis + (slice(index, index + 1),)]
    return one


def _batch_size(interface: Interface, shapes: Shapes) -> int:
    for spec in interface.inputs:
        axis = interface.batch_axis(spec)
        if axis is not None:
            return shapes[spec.name][axis]
    return 1
