"""Parsing of shapes in trtexec syntax, and construction and selection of profiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzen_compile.errors import ShapeError, UsageError
from ryzen_compile.spec.dims import Dim
from ryzen_compile.spec.interface import InputSpec, Interface, Role
from ryzen_compile.spec.profile import (
    Profile,
    derive_profile,
    format_profile,
    format_shape,
    parse_shapes,
    select_profile,
)
from ryzen_compile.spec.profile_request import ProfileRequest, resolve_profiles

IDS = InputSpec(name="ids", dtype="int64", dims=("batch", "seq"))
MASK = InputSpec(name="mask", dtype="int64", dims=("batch", "seq"))
IMAGE = InputSpec(name="image", dtype="float32", dims=("batch", 3, 224, 224))
TEXT = Interface(inputs=(IDS, MASK), outputs=())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image:1x3x224x224", {"image": (1, 3, 224, 224)}),
        ("ids:1x128, mask:1x128", {"ids": (1, 128), "mask": (1, 128)}),
        ("'serving_default:0':8", {"serving_default:0": (8,)}),
        ('"a,b:c":2x3', {"a,b:c": (2, 3)}),
        ("scalar:", {"scalar": ()}),
        ("a:b:4", {"a:b": (4,)}),
    ],
)
def test_shapes_are_parsed_in_trtexec_syntax(text: str, expected: dict[str, tuple[int, ...]]) -> None:
    assert parse_shapes(text) == expected


@pytest.mark.parametrize("text", ["image", "image:1x", ":3", "image:1,3", "image:-1x3", "image:1x3x2.5", "a:1,a:2", "a:١"])
def test_invalid_shapes_are_rejected_with_their_text(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_shapes(text)
    assert "`" in caught.value.message


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_.]{1,8}", fullmatch=True), st.lists(st.integers(0, 10**6), max_size=5).map(tuple), min_size=1
    )
)
def test_formatted_shapes_parse_to_the_same_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    assert parse_shapes(",".join(f"{name}:{format_shape(shape)}" for name, shape in shapes.items())) == shapes


def test_a_dim_has_the_same_size_in_all_inputs_of_a_derived_profile() -> None:
    profile = derive_profile(TEXT)
    assert profile.min == {"ids": (1, 1), "mask": (1, 1)}
    assert profile.opt == {"ids": (1, 128), "mask": (1, 128)}
    assert profile.max == {"ids": (8, 512), "mask": (8, 512)}


def test_a_derived_profile_uses_the_sizes_of_the_interface() -> None:
    sized = Interface(inputs=(IDS, MASK), outputs=(), typical_sizes={"seq": 32}, max_sizes={"batch": 2, "seq": 64})
    assert derive_profile(sized).opt["ids"] == (1, 32)
    assert derive_profile(sized).max["ids"] == (2, 64)


def test_a_derived_length_is_at_most_the_number_of_positions() -> None:
    positions = InputSpec(name="positions", dtype="int64", dims=("batch", "seq"), role="positions", low=0, high=0)
    profile = derive_profile(Interface(inputs=(IDS, positions), outputs=()))
    assert (profile.opt["ids"], profile.max["ids"]) == ((1, 1), (8, 1))


def test_a_static_input_has_one_shape() -> None:
    static = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=(2, 3)),), outputs=())
    assert [name for name, _ in derive_profile(static).corners()] == ["min"]


def test_an_input_without_rank_is_omitted_unless_a_shape_is_specified() -> None:
    unknown = Interface(inputs=(InputSpec(name="x", dtype="float32", dims=None), IDS), outputs=())
    assert set(derive_profile(unknown).opt) == {"ids"}
    assert resolve_profiles(unknown, opt_shapes=["x:2x3"])[0].opt["x"] == (2, 3)


def test_inputs_that_are_not_listed_take_the_sizes_of_shared_dims() -> None:
    (profile,) = resolve_profiles(TEXT, min_shapes=["ids:1x2"], opt_shapes=["ids:3x4"], max_shapes=["ids:5x6"])
    assert (profile.min["mask"], profile.opt["mask"], profile.max["mask"]) == ((1, 2), (3, 4), (5, 6))


def test_a_sum_of_dims_is_the_sum_of_their_sizes() -> None:
    mask = InputSpec(name="mask", dtype="int64", dims=("batch", "past+seq"))
    decoder = Interface(
        inputs=(IDS, mask), outputs=(), min_sizes={"past": 0}, typical_sizes={"past": 7, "seq": 1}, max_sizes={"past": 9}
    )
    profile = derive_profile(decoder)
    assert (profile.min["mask"], profile.opt["mask"], profile.max["mask"]) == ((1, 1), (1, 8), (8, 521))


def test_opt_shapes_alone_make_a_static_profile_as_in_trtexec() -> None:
    (profile,) = resolve_profiles(TEXT, opt_shapes=["ids:2x16,mask:2x16"])
    assert profile.min == profile.opt == profile.max == {"ids": (2, 16), "mask": (2, 16)}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"max": {"ids": (4, 64)}}, ((1, 1), (1, 64), (4, 64))),
        ({"max": {"ids": (4, 1000)}}, ((1, 1), (1, 128), (4, 1000))),
        ({"min": {"ids": (2, 16)}}, ((2, 16), (2, 128), (8, 512))),
        ({"min": {"ids": (2, 600)}}, ((2, 600), (2, 600), (8, 600))),
        ({"opt": {"ids": (2, 16)}, "max": {"ids": (4, 64)}}, ((1, 1), (2, 16), (4, 64))),
        ({"min": {"ids": (1, 2)}, "max": {"ids": (4, 64)}}, ((1, 2), (4, 64), (4, 64))),
        ({"max": {"mask": (4, 64)}}, ((1, 1), (1, 64), (4, 64))),
    ],
)
def test_a_bound_without_its_counterpart_is_a_range(
    shapes: dict[str, dict[str, tuple[int, ...]]], expected: tuple[tuple[int, ...], ...]
) -> None:
    request = ProfileRequest(**shapes)
    profile = request.profile(TEXT)
    for name in ("ids", "mask"):
        assert (profile.min[name], profile.opt[name], profile.max[name]) == expected
    assert request.is_complete == ({"min", "max"} <= shapes.keys())


def test_given_bounds_replace_those_of_the_interface() -> None:
    sized = Interface(inputs=(IDS, MASK), outputs=(), typical_sizes={"seq": 32}, min_sizes={"seq": 8}, max_sizes={"seq": 64})
    assert ProfileRequest(max={"ids": (4, 200)}).profile(sized).max["ids"] == (4, 200)
    smaller = ProfileRequest(max={"ids": (4, 5)}).profile(sized)
    assert (smaller.min["ids"], smaller.opt["ids"]) == ((1, 5), (1, 5))
    assert ProfileRequest(min={"ids": (1, 100)}).profile(sized).max["ids"] == (8, 100)


def test_the_nth_shapes_of_each_kind_make_the_nth_profile() -> None:
    profiles = resolve_profiles(
        TEXT, min_shapes=["ids:1x1", "ids:1x64"], opt_shapes=["ids:1x8", "ids:1x128"], max_shapes=["ids:1x63", "ids:4x256"]
    )
    assert [profile.max["ids"] for profile in profiles] == [(1, 63), (4, 256)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("idz:1x2", "no input `idz`"),
        ("ids:1x2x3", "3 dimensions"),
    ],
)
def test_a_shape_that_does_not_match_the_model_is_rejected(shapes: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_profiles(TEXT, opt_shapes=[shapes])


def test_a_static_size_cannot_be_changed() -> None:
    with pytest.raises(UsageError, match="always 224"):
        resolve_profiles(Interface(inputs=(IMAGE,), outputs=()), opt_shapes=["image:1x3x256x224"])


def test_a_range_out_of_order_is_rejected() -> None:
    with pytest.raises(UsageError, match="out of order"):
        resolve_profiles(TEXT, min_shapes=["ids:4x4"], opt_shapes=["ids:2x4"], max_shapes=["ids:8x8"])


def test_a_shape_outside_every_profile_is_reported_with_its_axis() -> None:
    profile = derive_profile(TEXT)
    assert select_profile([profile], {"ids": (8, 512), "mask": (8, 512)}) is profile
    with pytest.raises(ShapeError, match=r"`ids` is 9x4: axis 0 takes 1..8, got 9"):
        select_profile([profile], {"ids": (9, 4), "mask": (9, 4)})
    with pytest.raises(ShapeError, match="3 dimensions, it takes 2"):
        select_profile([profile], {"ids": (1, 1, 1), "mask": (1, 1)})


def test_corners_do_not_repeat() -> None:
    low, high = {"x": (1,)}, {"x": (4,)}
    assert [name for name, _ in Profile(min=low, opt=low, max=high).corners()] == ["min", "max"]


def test_many_inputs_of_the_same_shapes_are_abbreviated_to_the_first_and_the_last() -> None:
    shapes = {"ids": (1, 7), **{f"past.{index}": (1, 8, 16, 64) for index in range(32)}}
    profile = Profile(min=shapes, opt=shapes, max=shapes)
    assert str(profile) == "ids:1x7,past.0 .. past.31 (32 inputs):1x8x16x64"
    few = Profile(min=shapes, opt=shapes, max={**shapes, **{f"past.{index}": (1, 8, 99, 64) for index in range(30)}})
    assert str(few).endswith("max ids:1x7,past.0 .. past.29 (30 inputs):1x8x99x64,past.30:1x8x16x64,past.31:1x8x16x64")


def test_the_only_axis_of_an_input_is_a_length_unless_another_input_makes_it_a_batch() -> None:
    alone = InputSpec(name="x", dtype="float32", dims=("N",))
    assert derive_profile(Interface(inputs=(alone,), outputs=())).max == {"x": (512,)}
    rows = InputSpec(name="rows", dtype="float32", dims=("N", 4))
    assert derive_profile(Interface(inputs=(alone, rows), outputs=())).max == {"x": (8,), "rows": (8, 4)}


def test_a_short_profile_lists_the_inputs_that_determine_the_others() -> None:
    def spec(name: str, *dims: Dim, role: Role = "values") -> InputSpec:
        return InputSpec(name=name, dtype="float32", dims=dims, role=role)

    ids, mask = spec("ids", "batch", "seq"), spec("mask", "batch", "past+seq")
    states = [spec(f"past.{index}", "batch", 2, "past", 8, role="state") for index in range(8)]
    interface = Interface(
        inputs=(ids, mask, *states, spec("rate")), outputs=(), typical_sizes={"past": 6, "seq": 3, "batch": 2}
    )
    profile = derive_profile(interface)
    text = format_profile(profile, interface)
    assert text == "min ids:1x1,past.0:1x2x1x8  opt ids:2x3,past.0:2x2x6x8  max ids:8x512,past.0:8x2x512x8"
    options = [part.split()[1] for part in text.split("  ")]
    assert resolve_profiles(interface, min_shapes=options[:1], opt_shapes=options[1:2], max_shapes=options[2:]) == (profile,)


def test_a_short_profile_lists_all_but_states_if_no_input_is_dynamic_and_the_sum_of_an_unlisted_dim() -> None:
    fixed = Interface(
        inputs=(
            InputSpec(name="x", dtype="float32", dims=(1, 4)),
            InputSpec(name="past", dtype="float32", dims=(1, 9), role="state"),
        ),
        outputs=(),
    )
    assert format_profile(derive_profile(fixed), fixed) == "x:1x4"
    total = Interface(inputs=(InputSpec(name="mask", dtype="int64", dims=("a+b",)),), outputs=())
    assert format_profile(derive_profile(total), total).startswith("min mask:2  ")
