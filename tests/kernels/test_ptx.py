"""Removal of undeclared kernel parameters from PTX."""

from __future__ import annotations

import pytest

from ryzen_compile.kernels.ptx import drop_hidden_parameters

PTX = """.version 8.0
.target sm_90a
.visible .entry copy(
	.param .u64 .ptr .global .align 1 copy_param_0,
	.param .u32 copy_param_1,
	.param .u64 .ptr .global .align 1 copy_param_2,
	.param .u64 .ptr .global .align 1 copy_param_3
)
.reqntid 128
{
	ld.param.b64 	%rd4, [copy_param_0];
	ld.param.b32 	%r1, [copy_param_1];
	ret;
}
"""


def test_undeclared_parameters_are_removed() -> None:
    result, hidden = drop_hidden_parameters(PTX, 2)
    assert hidden == 2
    assert "copy_param_2" not in result
    assert "copy_param_1\n)" in result
    assert result.split("{")[1] == PTX.split("{")[1]


def test_declared_parameters_are_kept() -> None:
    result, hidden = drop_hidden_parameters(PTX, 4)
    assert hidden == 0
    assert result.split() == PTX.split()


def test_a_hidden_parameter_that_is_read_is_rejected() -> None:
    with pytest.raises(ValueError, match="`copy` reads its hidden parameter `copy_param_1`"):
        drop_hidden_parameters(PTX, 1)


def test_a_name_with_the_same_prefix_is_another_parameter() -> None:
    ptx = PTX.replace("[copy_param_1]", "[copy_param_11]")
    assert drop_hidden_parameters(ptx, 1)[1] == 3


def test_fewer_parameters_than_declared_are_rejected() -> None:
    with pytest.raises(ValueError, match="has 4 parameters, but 5 were declared"):
        drop_hidden_parameters(PTX, 5)


@pytest.mark.parametrize(("ptx", "count"), [("", 0), (PTX + PTX, 2)])
def test_exactly_one_entry_is_expected(ptx: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"the PTX has {count} entries, expected one"):
        drop_hidden_parameters(ptx, 2)
