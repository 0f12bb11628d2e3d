"""Profiles as the user requests them: shapes of some kinds and of some inputs, from which the others follow."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.profile import Profile, Shape, default_sizes, derive_profile, format_shape, parse_shapes
from ryzen_compile.utils.record import Record


class ProfileRequest(Record, frozen=True):
    """The shapes that the user gives for one profile, by input name.

    Without any, the profile is derived. As in trtexec, optimum shapes alone are the only shapes of the profile, and with
    minimum and maximum shapes, the optimum is the maximum if none is given. In contrast to trtexec, a minimum or maximum that
    lacks its counterpart bounds a range: the counterpart, and an optimum that is not given, are derived.
    """

    min: dict[str, Shape] = {}
    opt: dict[str, Shape] = {}
    max: dict[str, Shape] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every input that is named has all its shapes, so that nothing of them is derived."""
        return bool(self.min or self.opt or self.max) and self.min.keys() == self.max.keys()

    def bound(self, interface: Interface) -> Interface:
        """Return `interface` with the ranges and typical sizes that the shapes determine."""
        low, typical, high = dict(interface.min_sizes), dict(interface.typical_sizes), dict(interface.max_sizes)
        dims = default_sizes(interface)[0]
        for name in (*self.min, *self.opt, *self.max):
            smallest, optimum, largest = self._given(name)
            for axis, dim in enumerate(interface.input(name).dims or ()):
                if dim not in dims or isinstance(dim, int):
                    continue
                for sizes, shape in ((low, smallest), (typical, optimum), (high, largest)):
                    if shape is not None:
                        sizes[dim] = shape[axis]
                if dim in high and largest is None:
                    high[dim] = max(high[dim], low.get(dim, 1))
        return msgspec.structs.replace(interface, min_sizes=low, typical_sizes=typical, max_sizes=high)

    def profile(self, interface: Interface) -> Profile:
        """Return the requested profile. Raises UsageError for shapes out of order."""
        derived = derive_profile(self.bound(interface))
        low, opt, high = dict(derived.min), dict(derived.opt), dict(derived.max)
        for name in (*self.min, *self.opt, *self.max):
            smallest, optimum, largest = self._given(name)
            only = next(shape for shape in (largest, optimum, smallest) if shape is not None)
            high[name] = largest or high.get(name, only)
            low[name] = smallest or low.get(name, only)
            opt[name] = optimum or opt.get(name, only)
            shapes = (low[name], opt[name], high[name])
            if not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
                ranges = [f"{kind} {format_shape(shape)}" for kind, shape in zip(("min", "opt", "max"), shapes, strict=True)]
                raise UsageError(
                    f"`{name}`: {', '.join(ranges)} are out of order", hint="each axis must have min <= opt <= max"
                )
        return Profile(min=low, opt=opt, max=high)

    def _given(self, name: str) -> tuple[Shape | None, Shape | None, Shape | None]:
        """Return the minimum, optimum and maximum shapes of an input, None for each that is derived."""
        smallest, optimum, largest = self.min.get(name), self.opt.get(name), self.max.get(name)
        if smallest is None and largest is None:
            return optimum, optimum, optimum
        return smallest, optimum if optimum is not None or smallest is None else largest, largest


def parse_requests(
    interface: Interface,
    *,
    min_shapes: Sequence[str] = (),
    opt_shapes: Sequence[str] = (),
    max_shapes: Sequence[str] = (),
) -> tuple[ProfileRequest, ...]:
    """Return the requests of the n-th minimum, optimum and maximum shapes, in trtexec's syntax; empty without shapes.

    Raises UsageError for unknown inputs and wrong ranks.
    """
    count = max(len(min_shapes), len(opt_shapes), len(max_shapes))
    requests = []
    for index in range(count):
        low, opt, high = (
            _parse_input_shapes(interface, texts[index]) if index < len(texts) else {}
            for texts in (min_shapes, opt_shapes, max_shapes)
        )
        requests.append(ProfileRequest(min=low, opt=opt, max=high))
    return tuple(requests)


def resolve_profiles(
    interface: Interface,
    *,
    min_shapes: Sequence[str] = (),
    opt_shapes: Sequence[str] = (),
    max_shapes: Sequence[str] = (),
) -> tuple[Profile, ...]:
    """Return the profiles that the user requests; without shapes, the derived one.

    Inputs that are not listed take the sizes of the dims that they share with listed inputs, and default sizes for other dims.
    Raises UsageError for unknown inputs, wrong ranks and ranges out of order.
    """
    requests = parse_requests(interface, min_shapes=min_shapes, opt_shapes=opt_shapes, max_shapes=max_shapes)
    return tuple(request.profile(interface) for request in requests or (ProfileRequest(),))


def _parse_input_shapes(interface: Interface, text: str) -> dict[str, Shape]:
    """Parse shapes and validate them against the inputs of `interface`."""
    inputs = {spec.name: spec for spec in interface.inputs}
    shapes = parse_shapes(text)
    for name, shape in shapes.items():
        if name not in inputs:
            raise UsageError(f"the model has no input `{name}`", hint=did_you_mean(name, list(inputs)))
        dims = inputs[name].dims
        if dims is not None and len(dims) != len(shape):
            raise UsageError(
                f"`{name}:{format_shape(shape)}` has {len(shape)} dimensions, the input {inputs[name]} has {len(dims)}"
            )
        for axis, (dim, size) in enumerate(zip(dims or (), shape, strict=False)):
            if isinstance(dim, int) and dim != size:
                raise UsageError(f"`{name}:{format_shape(shape)}`: axis {axis} of {inputs[name]} is always {dim}")
    return shapes
