from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from livedraft.contracts.errors import CorruptRecord
from livedraft.contracts.messages import Array, DType
from livedraft.traces.arrays import bf16_to_float32, describe, float32_to_bf16, from_numpy, to_float32, to_numpy


@pytest.mark.parametrize(
    ("dtype", "kind"), [("f4", "f4"), ("f2", "f2"), ("i8", "i8"), ("i4", "i4"), ("i2", "i2"), ("u1", "u1")]
)
@given(data=st.data())
def test_values_come_back(dtype: DType, kind: str, data: st.DataObject) -> None:
    values = data.draw(hnp.arrays(kind, hnp.array_shapes(min_dims=0, min_side=0)))
    back = to_numpy(from_numpy(values, dtype))
    assert back.shape == values.shape
    np.testing.assert_array_equal(back, values)


def test_bytes_are_little_endian_and_row_major() -> None:
    array = from_numpy(np.array([[1, 2], [3, 4]], ">i4").T, "i4")
    assert array.data == bytes([1, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])
    assert describe(array) == "i4[2,2]"


@pytest.mark.parametrize(("values", "dtype"), [([70000], "i2"), ([-1], "u1"), ([2**31], "i4")])
def test_an_integer_that_does_not_fit_is_refused(values: list[int], dtype: DType) -> None:
    with pytest.raises(OverflowError):
        from_numpy(values, dtype)


def test_floats_do_not_become_integers() -> None:
    with pytest.raises(TypeError):
        from_numpy([1.5], "i4")


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="i4", shape=(2,), data=b"1234"),
        Array(dtype="i4", shape=(-1,), data=b"1234"),
        Array(dtype="i4", shape=(-1, -1), data=b"1234"),
        Array(dtype="u1", shape=(1,) * 70, data=b"1"),
        Array(dtype="i4", shape=(0, 1 << 64), data=b""),
    ],
)
def test_bytes_that_do_not_fill_the_shape_are_refused(array: Array) -> None:
    with pytest.raises(CorruptRecord):
        to_numpy(array)


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F800000, 0x3F80),  # 1.0
        (0x3F808000, 0x3F80),  # a tie goes to the even mantissa, down
        (0x3F818000, 0x3F82),  # ... and up
        (0x3F808001, 0x3F81),  # just above a tie
        (0x3F807FFF, 0x3F80),  # just below
        (0x7F7FFFFF, 0x7F80),  # the largest float rounds to infinity
        (0x80000000, 0x8000),  # minus zero
        (0xFF800000, 0xFF80),  # minus infinity
        (0x7F800001, 0x7FC0),  # a NaN whose mantissa would vanish
        (0xFFFFFFFF, 0xFFFF),  # a NaN that would carry into the sign
    ],
)
def test_bfloat16_rounds_to_nearest_even(bits: int, rounded: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    assert int(float32_to_bf16(value)[0]) == rounded


@given(hnp.arrays(np.uint16, 20))
def test_bfloat16_values_survive_the_way_through_float32(bits: np.ndarray) -> None:
    floats = bf16_to_float32(bits)
    back = float32_to_bf16(floats)
    np.testing.assert_array_equal(back[~np.isnan(floats)], bits[~np.isnan(floats)])
    assert np.isnan(bf16_to_float32(back[np.isnan(floats)])).all()


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_bfloat16_is_within_half_a_unit(values: np.ndarray) -> None:
    back = to_float32(from_numpy(values, "bf2"))
    assert back.shape == values.shape
    # 8 bits of precision; 1e-38 for subnormals.
    assert (np.abs(back - values) <= np.abs(values) * 2.0**-8 + 1e-38).all()
