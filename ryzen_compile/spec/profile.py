"""Profiles: the shapes that an engine is built for, and whether a feed fits them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ryzen_compile.errors import ShapeError, UsageError, did_you_mean
from ryzen_compile.spec.interface import Interface, resolve_dim
from ryzen_compile.utils.record import Record

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


_MAX_LISTED_INPUTS = 4
"""More inputs than this of the same shapes are not named one by one."""


class Profile(Record, frozen=True):
    """One range of shapes: for every input its smallest, its tuned and its largest."""

    min: dict[str, Shape]
    opt: dict[str, Shape]
    max: dict[str, Shape]

    def corners(self) -> tuple[tuple[str, dict[str, Shape]], ...]:
        """Return `min`, `opt` and `max` by name, without those that repeat an earlier one."""
        found: list[tuple[str, dict[str, Shape]]] = []
        for name, shapes in (("min", self.min), ("opt", self.opt), ("max", self.max)):
            if all(shapes != earlier for _, earlier in found):
                found.append((name, shapes))
        return tuple(found)

    def mismatch(self, shapes: Shapes) -> str | None:
        """Return why `shapes` lie outside this profile, in one sentence, or None."""
        for name, smallest in self.min.items():
            given, largest = shapes[name], self.max[name]
            if len(given) != len(smallest):
                return f"`{name}` has {len(given)} dimensions, it takes {len(smallest)}"
            for axis, (low, size, high) in enumerate(zip(smallest, given, largest, strict=True)):
                if not low <= size <= high:
                    return f"`{name}` is {format_shape(given)}: axis {axis} takes {low}..{high}, got {size}"
        return None

    def __str__(self) -> str:
        """Spell it as trtexec does; of many inputs of the same shapes, as caches are, the first and the last are named."""
        alike: dict[tuple[Shape, ...], list[str]] = {}
        for name in self.min:
            alike.setdefault((self.min[name], self.opt[name], self.max[name]), []).append(name)

        def side(shapes: Shapes) -> str:
            parts: list[str] = []
            for names in alike.values():
                shape = format_shape(shapes[names[0]])
                if len(names) > _MAX_LISTED_INPUTS:
                    parts.append(f"{names[0]} .. {names[-1]} ({len(names)} inputs):{shape}")
                else:
                    parts += (f"{name}:{shape}" for name in names)
            return ",".join(parts)

        if self.min == self.max:
            return side(self.opt)
        return f"min {side(self.min)}  opt {side(self.opt)}  max {side(self.max)}"


def format_shape(shape: Sequence[int]) -> str:
    """Return `1x3x224x224`; a scalar is the empty string."""
    return "x".join(map(str, shape))


def parse_shapes(text: str) -> dict[str, Shape]:
    """Read `input:1x3x224x224,"other:0":8`, as trtexec spells shapes; a name may be quoted and may hold colons.

    Raises UsageError for anything else.
    """
    found: dict[str, Shape] = {}
    for part in _split_list(text):
        name, colon, sizes = part.rpartition(":")
        name = name.strip()
        if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
            name = name[1:-1]
        words = [] if sizes == "" else sizes.split("x")
        if not colon or not name or not all(word.isascii() and word.isdigit() for word in words):
            raise UsageError(f"`{part}` is not a shape", hint="write NAME:1x3x224x224, several separated by commas")
        if name in found:
            raise UsageError(f"`{name}` is given two shapes in `{text}`", hint="name each input once")
        found[name] = tuple(int(word) for word in words)
    return found


def _split_list(text: str) -> list[str]:
    parts, quote, start = [], "", 0
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == ",":
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def derive_profile(interface: Interface) -> Profile:
    """Make the profile of an interface when the user gave none.

    A dynamic dimension runs from `interface.smallest` (else 1) to `interface.largest`, tuned at `interface.typical`. Where they
    do not name it, one that is the first axis of an input of several counts as a batch (1..8, tuned at 1) and any other as a
    length (1..512, tuned at 128). A dimension has one size wherever its name stands, and a sum such as `past+seq` that of its
    terms.
    An input without a rank, or that is no tensor, is left out.
    """
    low, tuned, high = (_input_shapes(interface, sizes) for sizes in _dim_sizes(interface))
    return Profile(min=low, opt=tuned, max=high)


def resolve_profiles(
    interface: Interface,
    *,
    min_shapes: Sequence[str] = (),
    opt_shapes: Sequence[str] = (),
    max_shapes: Sequence[str] = (),
) -> tuple[Profile, ...]:
    """Make the profiles that the user asked for: the n-th of each kind together are the n-th profile.

    As in trtexec a profile given by one kind alone is fixed at it, and one without `tuned` is tuned at its largest. Inputs
    that are not named take the sizes of the dimensions that they share with those that are, and the derived ones elsewhere.
    Raises UsageError for unknown inputs, wrong ranks and ranges out of order.
    """
    count = max(len(min_shapes), len(opt_shapes), len(max_shapes))
    if not count:
        return (derive_profile(interface),)
    sides = (min_shapes, opt_shapes, max_shapes)
    return tuple(
        _make_profile(interface, [_parse_input_shapes(interface, texts[at]) if at < len(texts) else {} for texts in sides])
        for at in range(count)
    )


def _dim_sizes(interface: Interface) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Return the smallest, tuned and largest size of every named dimension of the inputs."""
    typical, largest = interface.typical_sizes, interface.max_sizes
    first = {spec.dims[0] for spec in interface.inputs if spec.dims and len(spec.dims) > 1}
    names = dict.fromkeys(
        term.strip()
        for spec in interface.inputs
        for dim in spec.dims or ()
        if isinstance(dim, str)
        for term in dim.split("+")
        if not term.strip().isdecimal()
    )
    low = {name: interface.min_sizes.get(name, 1) for name in names}
    tuned = {name: typical.get(name, min(1 if name in first else 128, largest.get(name, 128))) for name in names}
    high = {name: largest.get(name, max(8 if name in first else 512, typical.get(name, 1))) for name in names}
    return low, tuned, high


def _input_shapes(interface: Interface, sizes: Mapping[str, int]) -> dict[str, Shape]:
    return {
        spec.name: tuple(resolve_dim(dim, sizes) or 0 for dim in spec.dims)
        for spec in interface.inputs
        if spec.dims is not None
    }


def _parse_input_shapes(interface: Interface, text: str) -> dict[str, Shape]:
    """Read shapes and hold them to the inputs of `interface`."""
    known = {spec.name: spec for spec in interface.inputs}
    shapes = parse_shapes(text)
    for name, shape in shapes.items():
        if name not in known:
            raise UsageError(f"the model has no input `{name}`", hint=did_you_mean(name, list(known)))
        dims = known[name].dims
        if dims is not None and len(dims) != len(shape):
            raise UsageError(f"`{name}:{format_shape(shape)}` has {len(shape)} dimensions, the input {known[name]} {len(dims)}")
        for axis, (dim, size) in enumerate(zip(dims or (), shape, strict=False)):
            if isinstance(dim, int) and dim != size:
                raise UsageError(f"`{name}:{format_shape(shape)}`: axis {axis} of {known[name]} is always {dim}")
    return shapes


def _make_profile(interface: Interface, min_opt_max: Sequence[Mapping[str, Shape]]) -> Profile:
    """Make one profile of the shapes given as its smallest, tuned and largest."""
    low, opt, high = min_opt_max
    named: dict[str, tuple[Shape, Shape, Shape]] = {}
    for name in {**low, **opt, **high}:
        most = high.get(name, opt.get(name, low.get(name, ())))
        tuned = opt.get(name, most)
        named[name] = low.get(name, tuned), tuned, most
        if not all(a <= b <= c for a, b, c in zip(*named[name], strict=True)):
            spelt = [f"{side} {format_shape(shape)}" for side, shape in zip(("min", "opt", "max"), named[name], strict=True)]
            raise UsageError(f"`{name}`: {', '.join(spelt)} are out of order", hint="each axis must have min <= opt <= max")
    whole: list[dict[str, Shape]] = []
    for side, sizes in enumerate(_dim_sizes(interface)):
        for name, shapes in named.items():
            dims = interface.input(name).dims or ()
            sizes |= {dim: size for dim, size in zip(dims, shapes[side], strict=False) if dim in sizes and isinstance(dim, str)}
        whole.append(_input_shapes(interface, sizes) | {name: shapes[side] for name, shapes in named.items()})
    return Profile(min=whole[0], opt=whole[1], max=whole[2])


def select_profile(profiles: Iterable[Profile], shapes: Shapes) -> Profile:
    """Return the first profile that takes `shapes`; raises ShapeError that says what each of them takes."""
    reasons = []
    for profile in profiles:
        problem = profile.mismatch(shapes)
        if problem is None:
            return profile
        reasons.append(problem)
    raise ShapeError(
        "; ".join(dict.fromkeys(reasons)), hint="build with --min-shapes/--opt-shapes/--max-shapes that hold this shape"
    )
