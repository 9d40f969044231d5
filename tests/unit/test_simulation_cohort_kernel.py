"""Arithmetic on arrays as machine code, against NumPy."""

import itertools

import numpy as np
import pytest
from llvmlite import ir

from homespun.simulation.cohort import kernel
from homespun.simulation.cohort.kernel import INDEX, POINTER, Array, Kernel

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
TYPES = {FLOAT: np.float32, DOUBLE: np.float64}
TOLERANCE = {FLOAT: 2e-6, DOUBLE: 1e-14}
REALS = pytest.mark.parametrize("real", [FLOAT, DOUBLE], ids=["float", "double"])


def called(real, write, *arrays):
    """`write(kernel, *views)` is compiled and called for these arrays, which it may change."""
    made = Kernel(real, {f"array {place}": POINTER for place in range(len(arrays))})
    elements = {np.dtype(t): element for element, t in TYPES.items()} | {np.dtype("i8"): INDEX}
    write(
        made,
        *(
            Array(
                pointer,
                elements[array.dtype],
                array.shape,
                tuple(stride // array.itemsize for stride in array.strides),
            )
            for (_, pointer), array in zip(list(made.given.items())[1:], arrays, strict=True)
        ),
    )
    return made.compiled()(*(array.ctypes.data for array in arrays))


def numbers(real, *shape, turned=False, seed=0):
    values = np.random.default_rng(seed).normal(size=shape[::-1] if turned else shape)
    return (values.T if turned else values).astype(TYPES[real], order="K")


# Sizes below, at and above those of registers and tiles, and none of them.
SIZES = [(1, 1, 1), (1, 40, 3), (7, 1, 5), (10, 32, 64), (13, 37, 10), (33, 70, 17), (21, 5, 1)]


@pytest.fixture(params=[(64, 20, 4), (32, 8, 3), (16, 8, 3)], ids=["avx512", "avx2", "sse"])
def processor(request, monkeypatch):
    """Code as it is written for this one; here it runs in the registers that there are."""
    machine = kernel._machine()
    made = kernel._Machine(machine.features, *request.param)
    monkeypatch.setattr(kernel, "_machine", lambda: made)


@pytest.mark.usefixtures("processor")
@REALS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_of_matrices_in_every_layout(real, size):
    m, n, k = size
    for turned in itertools.product([False, True], repeat=3):
        left, right = numbers(real, m, k, turned=turned[0]), numbers(real, k, n, turned=turned[1])
        target, bias = numbers(real, m, n, turned=turned[2]), numbers(real, n)
        before = target.copy()

        def onto_bias(made, target, left, right, bias):
            made.product(target, left, right, bias)

        def onto_itself(made, target, left, right, _):
            made.product(target, left, right, target, made.number(-0.5))

        product = left.astype(float) @ right.astype(float)
        close = {"rtol": 0, "atol": TOLERANCE[real] * max(1, abs(product).max())}
        called(real, onto_itself, target, left, right, bias)
        np.testing.assert_allclose(target, before - 0.5 * product, **close)
        called(real, onto_bias, target, left, right, bias)
        np.testing.assert_allclose(target, bias + product, **close)


@pytest.mark.usefixtures("processor")
@REALS
def test_each_broadcasts_and_reads_any_strides(real):
    one, other = numbers(real, 3, 21), numbers(real, 4, 1, 21)
    target = numbers(real, 21, 4, 3).transpose(1, 2, 0)
    called(real, lambda made, *a: made.each(a[0], a[1:], made.at.fmul), target, one, other)
    np.testing.assert_array_equal(target, one * other)


@pytest.mark.usefixtures("processor")
@REALS
@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_sums_over_axes(real, axes):
    source = numbers(real, 3, 5, 19)
    target = np.zeros(source.sum(axes).shape, TYPES[real])
    called(real, lambda made, *a: made.total(a[0], a[1], axes), target, source)
    np.testing.assert_allclose(target, source.astype(float).sum(axes), atol=20 * TOLERANCE[real])


@REALS
def test_exp_and_log_are_exact_to_rounding(real):
    largest = {FLOAT: 87, DOUBLE: 708}[real]
    values = np.linspace(-largest + 2, largest, 1003).astype(TYPES[real])
    result = np.empty_like(values)
    called(real, lambda made, *a: made.each(a[0], a[1:], made.exp), result, values)
    np.testing.assert_allclose(result, np.exp(values.astype(np.longdouble)), rtol=TOLERANCE[real])
    back = np.empty_like(values)
    called(real, lambda made, *a: made.each(a[0], a[1:], made.log), back, result)
    np.testing.assert_allclose(back, np.log(result.astype(np.longdouble)), rtol=TOLERANCE[real])


@REALS
def test_what_is_no_number_stays_so(real):
    values = np.array([np.nan, 0.5, np.inf, -np.inf], TYPES[real])
    exp, log, product = (np.zeros(4, TYPES[real]) for _ in range(3))
    called(real, lambda made, *a: made.each(a[0], a[1:], made.exp), exp, values)
    assert np.isnan(exp).tolist() == [True, False, False, False]
    assert (exp[2], exp[3]) == (np.inf, 0)
    called(real, lambda made, *a: made.each(a[0], a[1:], made.log), log, values[:3].copy())
    assert np.isnan(log).tolist() == [True, False, True, False]
    matrix, target = np.outer(np.ones(2, TYPES[real]), values), np.zeros((2, 1), TYPES[real])
    called(real, lambda made, *a: made.product(*a), target, matrix, product[:, None] + 1)
    assert np.isnan(target).all()


@pytest.mark.parametrize("index", [0, 4, -1, 5, 2**40])
def test_an_index_out_of_range_is_told_and_not_followed(index):
    values, chosen, target = numbers(FLOAT, 5), np.array([index]), np.zeros(1, np.float32)

    def write(made, target, values, chosen):
        place = made.checked(made.read(chosen, [made.index(0)]), 5)
        made.write(target, [made.index(0)], made.read(values, [place]))

    inside = 0 <= index < 5
    assert called(FLOAT, write, target, values, chosen) == (not inside)
    assert target[0] == values[index if inside else 0]
