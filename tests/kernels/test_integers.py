"""Integer products bit for bit against integers of numpy, on random shapes, at extremes, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from workbench.errors import RecipeError
from workbench.formats.codes import GroupCodes
from workbench.formats.hadamard import Rotation
from workbench.formats.integer import Integer, IntegerLinear
from workbench.formats.integers import InputScheme, integer_sums, round_rows
from workbench.runtime.cpu_build import kernels
from workbench.runtime.cpu_integer import input_of
from workbench.runtime.cpu_source import Matrix

ISAS = kernels().isas()


def run(encoding: Integer, x: np.ndarray, positions: list[int], isa: str) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Products, codes as they are laid out, and counts, from the kernels."""
    tensors = {name: tensor.numpy() for name, tensor in encoding.tensors().items()}
    matrix = Matrix(encoding.kind, encoding.meta(), tensors)
    scales = tensors["scales"].view(np.uint16)
    y, codes, counts = kernels().integer_product(input_of(matrix), tensors["codes"], scales, x, positions, isa)
    return y, codes, counts


def codes_of(weights: np.ndarray, bits: int, scales: np.ndarray) -> GroupCodes:
    """Codes of whole numbers (out, in), one scale per row."""
    stored = torch.from_numpy((weights + 2 ** (bits - 1)).astype(np.uint8))
    return GroupCodes(stored, torch.from_numpy(scales).half().reshape(-1, 1), None, bits, weights.shape[1])


def expected(encoding: Integer, x: np.ndarray, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sums int64, and products in fp32 from them."""
    rows = round_rows(encoding.scheme, torch.from_numpy(x), torch.tensor(positions))
    weights = encoding.codes.codes.numpy().astype(np.int64) - 2 ** (encoding.bits - 1)
    order = encoding.scheme.order
    weights = weights if order is None else weights[:, order.numpy()]
    codes = rows.codes.numpy().astype(np.int64)
    sums = integer_sums(codes, weights, encoding.scheme.channels, encoding.scheme.doublings)
    assert np.abs(sums).max(initial=0) <= 2**31 - 1
    scale = encoding.codes.scales.float().numpy().T * rows.scales.numpy()
    return sums, sums.astype(np.float32) * scale


@st.composite
def schemes(draw: st.DrawFn) -> dict[str, Any]:
    """Sections, powers and what goes with them, of those whose every sum fits."""
    channels = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    steps = draw(st.lists(st.integers(0, 4), min_size=len(channels) - 1, max_size=len(channels) - 1))
    powers = [int(p) for p in np.cumsum([0, *steps])[::-1]]
    bits, weight_bits = draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 8]))
    most = 2 ** (bits - 1) * (2**weight_bits - 1)
    assume(sum(most * count << power for count, power in zip(channels, powers, strict=True)) < 2**31)
    return {
        "channels": tuple(channels),
        "powers": tuple(powers),
        "out": draw(st.integers(1, 50)),
        "rows": draw(st.integers(1, 70)),
        "bits": bits,
        "weight_bits": weight_bits,
        "static": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


def encoding_of(s: dict[str, Any], rng: np.random.Generator) -> Integer:
    width, top = sum(s["channels"]), 2 ** (s["weight_bits"] - 1)
    weights = rng.integers(-top, top, (s["out"], width))
    weights[rng.random(weights.shape) < 0.3] = -top  # both extremes are what sums overflow on
    weights[0] = top - 1
    starts = (0, 1, 5) if s["static"] else ()
    bias = torch.from_numpy(rng.normal(size=width)).half().float() if s["bias"] else None
    scheme = InputScheme(
        s["bits"],
        s["channels"],
        s["powers"],
        order=torch.from_numpy(rng.permutation(width)),
        bias=bias,
        steps=torch.from_numpy(rng.uniform(0.001, 0.1, 3).astype(np.float32)) if s["static"] else None,
        starts=starts,
        limit=2.0 ** (s["bits"] - 1) - 1 if s["static"] else 0.0,
    )
    scales = rng.uniform(0.001, 0.1, s["out"]).astype(np.float32)
    return Integer(codes_of(weights, s["weight_bits"], scales), scheme, None if bias is None else torch.zeros(s["out"]))


@pytest.mark.parametrize("isa", ISAS)
@given(s=schemes())
@settings(max_examples=40, deadline=None)
def test_equal_bit_for_bit_on_random_shapes(isa: str, s: dict[str, Any]) -> None:
    rng = np.random.default_rng(s["seed"])
    encoding = encoding_of(s, rng)
    x = rng.normal(size=(s["rows"], encoding.shape[1])).astype(np.float32) * 3
    positions = [int(p) for p in rng.integers(0, 9, s["rows"])]
    y, _, counts = run(encoding, x, positions, isa)
    _, wanted = expected(encoding, x, positions)
    np.testing.assert_array_equal(y, wanted)
    rounded = round_rows(encoding.scheme, torch.from_numpy(x), torch.tensor(positions))
    assert counts == list(zip(rounded.clamped.tolist(), rounded.beyond.tolist(), strict=True))
    layer = IntegerLinear(encoding, None, torch.float32, torch.device("cpu"))
    layer.first_position = positions[0]
    np.testing.assert_array_equal(layer(torch.from_numpy(x[:1])).detach().numpy(), wanted[:1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_of_both_operands(isa: str, bits: int, weight_bits: int, sign: int) -> None:
    """Every product at the end of both ranges, in the longest sums that are let through, with the deepest shifts."""
    channels, powers = (4, 3, 517, 1500), (11, 9, 2, 0)
    weights = np.full((33, sum(channels)), -(2 ** (weight_bits - 1)))
    scheme = InputScheme(bits, channels, powers, steps=torch.ones(1), starts=(0,), limit=1.0)
    encoding = Integer(codes_of(weights, weight_bits, np.ones(33, np.float32)), scheme, None)
    rows = 45  # more than whole tiles of rows
    x = np.full((rows, sum(channels)), sign * 1e9, np.float32)
    sums, wanted = expected(encoding, x, [0] * rows)
    assert np.abs(sums).max() > 2 ** (bits + weight_bits + 9)
    y, codes, counts = run(encoding, x, [0] * rows, isa)
    np.testing.assert_array_equal(y, wanted)
    assert set(np.unique(codes)) <= {0.0, float(2 ** (bits - 1) - 1 if sign > 0 else -(2 ** (bits - 1)))}
    assert counts == [(sum(channels), sum(channels))] * rows


def test_sums_that_could_overflow_are_refused() -> None:
    scheme = InputScheme(8, (4096, 4096), (10, 0))
    with pytest.raises(RecipeError, match="fewer groups"):
        Integer(codes_of(np.zeros((1, 8192), np.int64), 8, np.ones(1, np.float32)), scheme, None)


@pytest.mark.parametrize("isa", ISAS)
def test_chunks_of_positions_and_what_lies_past_them(isa: str) -> None:
    scheme = InputScheme(8, (8,), steps=torch.tensor([1.0, 2.0, 4.0]), starts=(0, 1, 256), limit=127.0)
    encoding = Integer(codes_of(np.eye(8, dtype=np.int64), 8, np.ones(8, np.float32)), scheme, None)
    positions = [0, 1, 255, 256, 257, 10_000]
    x = np.full((6, 8), 300.0, np.float32)
    y, codes, counts = run(encoding, x, positions, isa)
    np.testing.assert_array_equal(codes[:, 0], [127, 127, 127, 75, 75, 75])
    np.testing.assert_array_equal(y[:, 0], [127, 254, 254, 300, 300, 300])
    assert counts == [(8, 8)] * 3 + [(0, 0)] * 3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["requantize", "plain-groups", "rotation", "smooth"])
def test_other_schemes_agree_with_the_definition(isa: str, kind: str) -> None:
    rng = np.random.default_rng(3)
    width, out = 192, 40
    weights = torch.from_numpy(rng.integers(-8, 8, (out, width)).astype(np.uint8) + 8)
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (out, 3 if kind == "plain-groups" else 1))).half()
    codes = GroupCodes(weights, scales, None, 4, 64 if kind == "plain-groups" else width)
    scheme = {
        "requantize": InputScheme(8, (6, 50, 136), (5, 1, 0), "apart", order=torch.from_numpy(rng.permutation(width))),
        "plain-groups": InputScheme(4, (64, 64, 64), (0, 0, 0), "apart", clip=0.9),
        "rotation": InputScheme(4, (width,), clip=0.9, rotation=Rotation.random(width, 0)),
        "smooth": InputScheme(8, (width,), multipliers=torch.from_numpy(rng.uniform(0.5, 2, width).astype(np.float32))),
    }[kind]
    encoding = Integer(codes, scheme, None)
    x = rng.normal(size=(14, width)).astype(np.float32)
    y, _, _ = run(encoding, x, list(range(14)), isa)
    layer = IntegerLinear(encoding, None, torch.float32, torch.device("cpu"))
    wanted = layer(torch.from_numpy(x)).detach().numpy()
    # A rotation adds up in another order, which may move a value across a rounding boundary.
    np.testing.assert_allclose(y, wanted, atol=(0.05 if kind == "rotation" else 1e-5) * np.abs(wanted).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_stay_so_and_leave_others_alone(isa: str, bad: float) -> None:
    scheme = InputScheme(8, (20, 13), (2, 0), order=torch.randperm(33))
    weights = np.random.default_rng(0).integers(-127, 128, (17, 33))
    encoding = Integer(codes_of(weights, 8, np.ones(17, np.float32)), scheme, None)
    x = np.random.default_rng(1).normal(size=(5, 33)).astype(np.float32)
    clean, _, _ = run(encoding, x, [0] * 5, isa)
    x[2, 7] = bad
    y, _, _ = run(encoding, x, [0] * 5, isa)
    assert np.isnan(y[2]).all()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


def test_a_row_gives_the_same_alone_and_among_others() -> None:
    rng = np.random.default_rng(5)
    s = {
        "channels": (5, 70, 21),
        "powers": (4, 1, 0),
        "out": 100,
        "bits": 8,
        "weight_bits": 8,
        "static": False,
        "bias": True,
    }
    encoding = encoding_of(s, rng)
    x = rng.normal(size=(23, 96)).astype(np.float32)
    together, _, _ = run(encoding, x, [0] * 23, "auto")
    for i in range(23):
        np.testing.assert_array_equal(run(encoding, x[i : i + 1], [0], "auto")[0][0], together[i])
