"""The grid of cases that a comparison runs: every profile's corners, with identical and with mixed rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ryzen_compile.spec.profile import Profile, Shapes, spell_shape

if TYPE_CHECKING:
    from ryzen_compile.data.synthetic import Rows
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.passes import Feed


@dataclass(frozen=True, kw_only=True)
class Case:
    """One feed, and what it is there to show."""

    says: str
    """`opt 8x128, mixed rows`."""
    feed: Feed
    rows: Literal["identical", "mixed", "given"]
    """Whether the rows of the batch are all the same, all different, or as the user's data has them."""
    batch: int
    """How many rows are independent of each other; 1 where none are."""


def grid(interface: Interface, profiles: Sequence[Profile], *, seed: int, samples: Sequence[Feed] = ()) -> Iterator[Case]:
    """Yield the cases of every profile: min, opt and max; where there are several rows, identical and mixed ones.

    The values are those of `samples`, brought to the shapes of the case, and seeded ones where there are no samples.
    """
    from ryzen_compile.data.reshaping import fit

    number = 0
    for at, profile in enumerate(profiles):
        which = f"profile {at + 1} " if len(profiles) > 1 else ""
        corners = profile.corners()
        for corner, shapes in corners:
            batch = _batch(interface, shapes)
            both: tuple[Rows, ...] = ("identical", "mixed") if batch > 1 else ("mixed",)
            for rows in both:
                feed = fit(samples, interface, shapes, seed=seed + number, rows=rows)
                number += 1
                says = f"{which}{corner if len(corners) > 1 else 'at'} {spell_shape(next(iter(shapes.values()), ()))}".rstrip()
                says += f", {rows} rows" if batch > 1 else ""
                yield Case(says=says, feed=feed, rows=rows, batch=batch)


def given(interface: Interface, feeds: Iterable[Feed]) -> Iterator[Case]:
    """Yield the user's own feeds as cases."""
    for number, feed in enumerate(feeds):
        shapes = {name: tuple(array.shape) for name, array in feed.items()}
        spelt = spell_shape(next(iter(shapes.values()), ()))
        yield Case(says=f"sample {number + 1} {spelt}".rstrip(), feed=feed, rows="given", batch=_batch(interface, shapes))


def row(interface: Interface, feed: Feed, at: int) -> Feed:
    """Return row `at` of a feed as a batch of one."""
    one = {}
    for spec in interface.inputs:
        axis = interface.batch_axis(spec)
        array = feed[spec.name]
        one[spec.name] = array if axis is None else array[(slice(None),) * axis + (slice(at, at + 1),)]
    return one


def _batch(interface: Interface, shapes: Shapes) -> int:
    for spec in interface.inputs:
        axis = interface.batch_axis(spec)
        if axis is not None:
            return shapes[spec.name][axis]
    return 1
