"""Optimization profiles: the ranges of input shapes that an engine is built for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.spec.dims import dim_names, resolve_dim
from ryzen_compile.spec.interface import Inputs, Interface
from ryzen_compile.utils.record import Record

Shape = tuple[int, ...]
InputShapes = Mapping[str, Shape]
"""The shapes of some inputs, by input name."""

_MAX_LISTED_INPUTS = 4
"""A longer run of inputs with equal shapes is printed as its first and last name."""


class Profile(Record, frozen=True):
    """One range of input shapes: the minimum, optimum and maximum shape of every input."""

    min: dict[str, Shape]
    opt: dict[str, Shape]
    max: dict[str, Shape]

    def corners(self) -> tuple[tuple[str, dict[str, Shape]], ...]:
        """Return (name, shapes) for `min`, `opt` and `max`, omitting those that repeat an earlier one."""
        corners: list[tuple[str, dict[str, Shape]]] = []
        for name, shapes in (("min", self.min), ("opt", self.opt), ("max", self.max)):
            if all(shapes != previous for _, previous in corners):
                corners.append((name, shapes))
        return tuple(corners)

    def mismatch(self, shapes: InputShapes) -> str | None:
        """Return the reason why `shapes` lie outside this profile, in one sentence, or None if they fit."""
        for name, smallest in self.min.items():
            shape, largest = shapes[name], self.max[name]
            if len(shape) != len(smallest):
                return f"`{name}` has {len(shape)} dimensions, it takes {len(smallest)}"
            for axis, (low, size, high) in enumerate(zip(smallest, shape, largest, strict=True)):
                if not low <= size <= high:
                    return f"`{name}` is {format_shape(shape)}: axis {axis} takes {low}..{high}, got {size}"
        return None

    def __str__(self) -> str:
        """Return the profile in trtexec syntax; a long run of inputs with equal shapes is abbreviated to its first and last."""
        names_by_shapes: dict[tuple[Shape, ...], list[str]] = {}
        for name in self.min:
            names_by_shapes.setdefault((self.min[name], self.opt[name], self.max[name]), []).append(name)

        def format_shapes(shapes: InputShapes) -> str:
            parts: list[str] = []
            for names in names_by_shapes.values():
                shape = format_shape(shapes[names[0]])
                if len(names) > _MAX_LISTED_INPUTS:
                    parts.append(f"{names[0]} .. {names[-1]} ({len(names)} inputs):{shape}")
                else:
                    parts += (f"{name}:{shape}" for name in names)
            return ",".join(parts)

        if self.min == self.max:
            return format_shapes(self.opt)
        return f"min {format_shapes(self.min)}  opt {format_shapes(self.opt)}  max {format_shapes(self.max)}"


def format_profile(profile: Profile, interface: Interface) -> str:
    """Return the shapes that determine `profile`, in trtexec syntax: those of the inputs that introduce a dynamic dim.

    A state is listed only if it has a dim that no other input has. If no input is dynamic, all inputs but states are listed.
    """
    states = {state.input for state in interface.states} | {spec.name for spec in interface.inputs if spec.role == "state"}
    specs = sorted((spec for spec in interface.inputs if spec.name in profile.opt), key=lambda spec: spec.name in states)
    listed: list[str] = []
    known: set[str] = set()
    for with_sums in (False, True):
        for spec in specs:
            names = {name for dim in spec.dims or () for name in dim_names(dim) if with_sums or name == dim}
            if names - known or (spec.dims is None and with_sums):
                listed.append(spec.name)
            known |= names
    shown = listed or [spec.name for spec in specs if spec.name not in states] or list(profile.opt)
    low, opt, high = ({name: shapes[name] for name in shown} for shapes in (profile.min, profile.opt, profile.max))
    return str(Profile(min=low, opt=opt, max=high))


def find_profile_problem(profile: Profile, interface: Interface) -> str | None:
    """Return why a profile from a file does not belong to `interface`, or None if it does."""
    # An input of unknown rank, such as a sequence, has no shapes.
    specs = [spec for spec in interface.inputs if spec.dims is not None or spec.name in profile.opt]
    for name, shapes in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
        if shapes.keys() != {spec.name for spec in specs}:
            return f"its {name} shapes are of other inputs than those of the graph"
    for spec in specs:
        smallest, typical, largest = profile.min[spec.name], profile.opt[spec.name], profile.max[spec.name]
        if not len(smallest) == len(typical) == len(largest) or (spec.dims is not None and len(spec.dims) != len(typical)):
            return f"the shapes of `{spec}` have another rank"
        if any(not 0 <= low <= size <= high for low, size, high in zip(smallest, typical, largest, strict=True)):
            return f"the shapes of `{spec.name}` are not in ascending order"
    return None


def format_shape(shape: Sequence[int]) -> str:
    """Return the shape in the form `1x3x224x224`; the shape of a scalar is the empty string."""
    return "x".join(map(str, shape))


def format_shapes(arrays: Inputs) -> str:
    """Return the shapes of arrays by name in the form `ids 8x128, mask 8x128`."""
    return ", ".join(f"{name} {format_shape(array.shape)}" for name, array in arrays.items())


def parse_shapes(text: str) -> dict[str, Shape]:
    """Parse shapes in trtexec syntax: `input:1x3x224x224,"other:0":8`; a name may be quoted and may contain colons.

    Raises UsageError for anything else.
    """
    shapes: dict[str, Shape] = {}
    for part in _split_list(text):
        name, colon, sizes = part.rpartition(":")
        name = name.strip()
        if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
            name = name[1:-1]
        numbers = [] if sizes == "" else sizes.split("x")
        if not colon or not name or not all(number.isascii() and number.isdigit() for number in numbers):
            raise UsageError(f"`{part}` is not a shape", hint="use the form NAME:1x3x224x224, several separated by commas")
        if name in shapes:
            raise UsageError(f"`{name}` has two shapes in `{text}`", hint="list each input once")
        shapes[name] = tuple(int(number) for number in numbers)
    return shapes


def _split_list(text: str) -> list[str]:
    parts, quote, start = [], "", 0
    for position, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == ",":
            parts.append(text[start:position])
            start = position + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def derive_profile(interface: Interface) -> Profile:
    """Return the default profile of an interface, used if the user specifies no shapes.

    A dynamic dim ranges from `interface.min_sizes` (default 1) to `interface.max_sizes`, with its optimum at
    `interface.typical_sizes`. For dims that these do not list, the first axis of an input of rank 2 or more is a batch (1..8,
    optimum 1), and any other dim is a length (1..512, optimum 128). A dim has the same size everywhere, and a sum such as
    `past+seq` is the sum of its terms. An input of unknown rank is omitted.
    """
    low, optimum, high = (input_shapes(interface, sizes) for sizes in default_sizes(interface))
    return Profile(min=low, opt=optimum, max=high)


def default_sizes(interface: Interface) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return the minimum, optimum and maximum size of every named dim of the inputs, as `derive_profile` chooses them.

    A dim of positions is at most their number.
    """
    batch_dims = {spec.dims[0] for spec in interface.inputs if spec.dims and len(spec.dims) > 1}
    positions = {
        str(spec.dims[-1]): int(spec.high) + 1
        for spec in interface.inputs
        if spec.role == "positions" and spec.dims and spec.high is not None
    }
    low, optimum, high = {}, {}, {}
    for name in dict.fromkeys(name for spec in interface.inputs for dim in spec.dims or () for name in dim_names(dim)):
        low[name] = interface.min_sizes.get(name, 1)
        typical = interface.typical_sizes.get(name, 1 if name in batch_dims else 128)
        default_high = max(8 if name in batch_dims else 512, interface.typical_sizes.get(name, 1), low[name])
        default_high = min(default_high, positions.get(name, default_high))
        high[name] = interface.max_sizes.get(name, default_high)
        low[name] = min(low[name], high[name])
        optimum[name] = max(low[name], min(typical, high[name]))
    return low, optimum, high


def input_shapes(interface: Interface, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Return the shape of every input of known rank, given the sizes of the named dims."""
    return {
        spec.name: tuple(resolve_dim(dim, sizes) or 0 for dim in spec.dims)
        for spec in interface.inputs
        if spec.dims is not None
    }


def select_profile(profiles: Iterable[Profile], shapes: InputShapes) -> Profile:
    """Return the first profile that contains `shapes`. Raises ShapeError with the mismatch of each profile."""
    reasons = []
    for profile in profiles:
        problem = profile.mismatch(shapes)
        if problem is None:
            return profile
        reasons.append(problem)
    raise ShapeError(
        "; ".join(dict.fromkeys(reasons)), hint="build with --min-shapes/--opt-shapes/--max-shapes that include this shape"
    )
