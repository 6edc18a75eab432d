"""Encodings: disk and back is exact, what is read is checked, and modules compute with the stored weights."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch

from workbench.errors import EngineError, IntegrityError
from workbench.formats.bnb import Int8, Nf4
from workbench.formats.encodings import ALL_ENGINES, Dense, Encoding, Groups, from_parts

CPU = torch.device("cpu")
MAKE: dict[str, Callable[[torch.Tensor], Encoding]] = {
    "dense": Dense.of,
    "groups": lambda w: Groups.of(w, 3, 20),
    "groups-symmetric": lambda w: Groups.of(w, 5, 64, symmetric=True),
    "nf4": Nf4.of,
    "nf4-double": lambda w: Nf4.of(w, 32, double_quant=True),
    "int8": Int8.of,
    "int8-threshold": lambda w: Int8.of(w, 6.0),
}


def matrix(out: int = 96, width: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.mark.parametrize("name", MAKE)
def test_parts_give_the_same_encoding_again(name: str) -> None:
    encoding = MAKE[name](matrix())
    again = from_parts(encoding.kind, encoding.meta(), encoding.tensors())
    assert again.meta() == encoding.meta()
    assert again.shape == (96, 128)
    assert again.bits == encoding.bits
    assert torch.equal(again.dequantize(), encoding.dequantize())
    assert encoding.dequantize().dtype == torch.float32


@pytest.mark.parametrize("name", MAKE)
def test_stored_bits_are_the_bytes_of_the_tensors(name: str) -> None:
    encoding = MAKE[name](matrix())
    assert encoding.stored_bits == 8 * sum(t.numel() * t.element_size() for t in encoding.tensors().values())


@pytest.mark.parametrize("name", MAKE)
def test_dequantized_weights_are_near_the_matrix(name: str) -> None:
    weight = matrix()
    encoding = MAKE[name](weight)
    error = float((encoding.dequantize() - weight).norm() / weight.norm())
    # A grid of 2^bits points over about six standard deviations: step / sqrt(12), with half as much again to spare.
    assert error < 1.5 * 6 / 2**encoding.bits / 12**0.5 + 2**-8


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("out", [96, 33])
def test_a_module_computes_with_the_stored_weights(name: str, out: int) -> None:
    encoding = MAKE[name](matrix(out))
    bias = torch.linspace(-1, 1, out)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
    layer = encoding.module(bias, torch.float32, CPU).eval()
    with torch.no_grad():
        found = layer(x)
        expected = x @ encoding.dequantize().T + bias
    # bitsandbytes rounds activations: to bf16 in its AVX512 kernel (2^-9), to int8 per token (about 1/127 / sqrt(12)).
    tolerance = {"bnb-nf4": 0.01, "bnb-int8": 0.02}.get(encoding.kind, 1e-6)
    assert float((found - expected).norm() / expected.norm()) < tolerance
    assert not any(p.requires_grad for p in layer.parameters())
    again = encoding.module(bias, torch.float32, CPU).eval()
    with torch.no_grad():
        assert torch.equal(again(x), found), "running a module must not change the encoding it came from"


def test_bitsandbytes_runs_its_own_modules_on_the_reference_engine_only() -> None:
    import bitsandbytes

    assert isinstance(Nf4.of(matrix()).module(None, torch.float32, CPU), bitsandbytes.nn.Linear4bit)
    assert isinstance(Int8.of(matrix()).module(None, torch.float32, CPU), bitsandbytes.nn.Linear8bitLt)
    assert Nf4.engines == Int8.engines == ("reference",)
    assert Groups.engines == Dense.engines == ALL_ENGINES


def test_nf4_agrees_with_the_published_levels() -> None:
    weight = matrix(64, 64)
    encoding = Nf4.of(weight, 64)
    parts = encoding.tensors()
    codes = torch.stack([parts["codes"] >> 4, parts["codes"] & 15], dim=1).view(64, 64).long()
    # Dettmers et al. 2023, appendix E.
    negative = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004]
    positive = [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    levels = torch.tensor([*negative, 0.0, *positive])
    torch.testing.assert_close(encoding.dequantize(), levels[codes] * parts["absmax"][:, None])


@pytest.mark.parametrize(("width", "says"), [(48, "use rtn"), (96, "choose block_size 32")])
def test_nf4_blocks_that_run_over_row_ends_are_refused(width: int, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        Nf4.of(matrix(8, width), 64)


def test_a_missing_bitsandbytes_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "bitsandbytes":
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngineError, match="pip install"):
        Nf4.of(matrix())


def test_a_width_that_is_not_stored_is_refused() -> None:
    encoding = Groups.of(matrix(), 4, 64)
    assert torch.equal(encoding.dequantize(4), encoding.dequantize())
    with pytest.raises(EngineError, match="4 bits only, 3"):
        encoding.dequantize(3)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(IntegrityError, match="Did you mean 'groups'"):
        from_parts("group", {}, {})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("groups", {"bits": 9}),
        ("groups", {"bits": 4}),
        ("groups", {"bits": True}),
        ("groups", {"bits": "3"}),
        ("groups", {"group_size": 0}),
        ("groups", {"group_size": 10}),
        ("groups", {"group_size": 10**9}),
        ("groups", {"symmetric": True}),
        ("groups", {"symmetric": 0}),
        ("groups", {"shape": [96]}),
        ("groups", {"shape": [96, 129]}),
        ("groups", {"shape": [-96, -128]}),
        ("groups", {"shape": [96.0, 128.0]}),
        ("dense", {"shape": [128, 96]}),
        ("nf4", {"block_size": 63}),
        ("nf4", {"block_size": 32}),
        ("nf4", {"double_quant": True}),
        ("nf4", {"shape": [96, 256]}),
        ("nf4", {"shape": [128, 96]}),
        ("nf4-double", {"double_quant": False}),
        ("int8", {"threshold": -1.0}),
        ("int8", {"threshold": float("nan")}),
        ("int8", {"shape": [128, 96]}),
    ],
)
def test_metadata_that_does_not_fit_the_tensors_is_refused(name: str, changes: dict[str, Any]) -> None:
    encoding = MAKE[name](matrix())
    with pytest.raises(IntegrityError):
        from_parts(encoding.kind, {**encoding.meta(), **changes}, encoding.tensors())


@pytest.mark.parametrize("name", MAKE)
def test_every_metadata_field_and_tensor_is_needed(name: str) -> None:
    encoding = MAKE[name](matrix())
    for field in encoding.meta():
        with pytest.raises(IntegrityError):
            from_parts(encoding.kind, {k: v for k, v in encoding.meta().items() if k != field}, encoding.tensors())
    for part in encoding.tensors():
        rest = {k: v for k, v in encoding.tensors().items() if k != part}
        short = {**encoding.tensors(), part: encoding.tensors()[part][:-1]}
        with pytest.raises(IntegrityError):
            from_parts(encoding.kind, encoding.meta(), rest)
        with pytest.raises(IntegrityError):
            from_parts(encoding.kind, encoding.meta(), short)
