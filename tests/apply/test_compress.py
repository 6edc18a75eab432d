"""Carrying recipes out: units get their widths, the budget is what lands on disk, and work can be cancelled."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from workbench.apply.bnb import BnbInt8Config, BnbNf4Config
from workbench.apply.compress import compress
from workbench.apply.config import MethodConfig
from workbench.apply.recipe import Budget, Recipe
from workbench.apply.rtn import RtnConfig, linear_bits
from workbench.apply.solver import solve
from workbench.errors import Cancelled, EngineError, RecipeError
from workbench.formats.bnb import Int8, Nf4
from workbench.formats.codes import stored_bits
from workbench.formats.compressed import CompressedModel
from workbench.formats.encodings import Dense, Groups
from workbench.formats.rebuild import to_model
from workbench.models import LoadedModel, wrap
from workbench.progress import Job, JobState

TOKENS = torch.arange(60)[None] + 60


@pytest.fixture(scope="module")
def wide_model(make_model: object) -> LoadedModel:
    """A tiny Llama whose rows are multiples of 32, which NF4 blocks need."""
    from transformers import LlamaConfig
    from transformers.models.auto import AutoModelForCausalLM

    assert callable(make_model)
    tiny = make_model("llama")
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return wrap(module, tiny.tokenizer, name="wide", source="memory:wide")


def made(model: LoadedModel, *methods: MethodConfig) -> CompressedModel:
    return compress(model, Recipe.for_model(model, *methods))


def divergence(dense: LoadedModel, other: LoadedModel) -> float:
    with torch.no_grad():
        p = dense.module(TOKENS).logits.log_softmax(-1)
        q = other.module(TOKENS).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_linear_beats_its_unit_and_a_unit_beats_the_rest(tiny_model: LoadedModel) -> None:
    config = RtnConfig(bits=5, unit_bits={"blocks.0.qkv": 3, "blocks.0.k": 7, "blocks.1.o": 16}, output_bits=16)
    result = made(tiny_model, config)
    bits = {name: encoding.bits for name, encoding in result.linears.items()}
    expected = dict.fromkeys(bits, 5) | {"blocks.0.q": 3, "blocks.0.v": 3, "blocks.0.k": 7, "blocks.1.o": 16}
    assert bits == expected == linear_bits(config, tiny_model.architecture)
    assert isinstance(result.linears["blocks.1.o"], Dense)
    assert isinstance(result.embedding, Dense)
    assert result.output_bits == 16


def test_codes_are_those_of_the_definition(tiny_model: LoadedModel) -> None:
    before = {name: p.clone() for name, p in tiny_model.module.named_parameters()}
    result = made(tiny_model, RtnConfig(bits=3, group_size=16))
    for linear in tiny_model.architecture.linears:
        expected = Groups.of(tiny_model.linear_module(linear.id).weight, 3, 16)
        assert torch.equal(result.linears[linear.id].dequantize(), expected.dequantize())
    assert all(torch.equal(p, before[name]) for name, p in tiny_model.module.named_parameters())


def test_damage_falls_with_bits(tiny_model: LoadedModel) -> None:
    damages = [
        divergence(tiny_model, to_model(made(tiny_model, RtnConfig(bits=b, output_bits=16)))) for b in (2, 3, 4, 6, 8)
    ]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] < 1e-2 * damages[0]


@pytest.mark.parametrize("group_size", [1, 7, 64, 10_000])
def test_any_group_size_works(tiny_model: LoadedModel, group_size: int) -> None:
    result = made(tiny_model, RtnConfig(bits=6, group_size=group_size))
    weight = tiny_model.linear_module("blocks.0.down").weight
    assert float((result.linears["blocks.0.down"].dequantize() - weight).norm() / weight.norm()) < 0.05
    to_model(result)


def test_the_solved_budget_is_what_is_stored(tiny_model: LoadedModel) -> None:
    """The solver's count of bits and the compressed model's agree to the bit."""
    units = tiny_model.architecture.units
    rows = [
        (
            unit.id,
            bits,
            float(4.0**-bits * (1 + i % 3)),
            sum(stored_bits(x.out_features, x.in_features, bits, 20, False) for x in unit.linears),
            unit.n_weights,
        )
        for i, unit in enumerate(units)
        for bits in (2, 3, 4, 5, 6, 8)
    ]
    damage = pd.DataFrame(rows, columns=["unit", "bits", "damage", "stored_bits", "n_weights"])
    solution = solve(damage, Budget(average_bits=5.5), {"blocks.0.o": 16})
    config = RtnConfig(unit_bits=solution.unit_bits, group_size=20)
    recipe = Recipe.for_model(tiny_model, config, solution=solution)
    result = compress(tiny_model, recipe)
    assert result.effective_bits == pytest.approx(solution.achieved_bits, rel=1e-12)
    assert sum(e.stored_bits for e in result.linears.values()) == 8 * solution.achieved_bytes
    assert Recipe.model_validate(result.recipe) == recipe
    assert recipe.solution is not None
    assert recipe.solution.pinned == {"blocks.0.o": 16}


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("blocks.0.qvk", "blocks.0.qkv"), ("blocks.3.o", "blocks."), ("block.0.down", "blocks.0.down")],
)
def test_an_unknown_unit_names_the_nearest(tiny_model: LoadedModel, given: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"'{given}'.*Did you mean '{nearest}"):
        made(tiny_model, RtnConfig(unit_bits={given: 4}))


def test_a_recipe_of_another_model_is_refused(tiny_model: LoadedModel, wide_model: LoadedModel) -> None:
    with pytest.raises(RecipeError, match="another architecture"):
        compress(wide_model, Recipe.for_model(tiny_model, RtnConfig()))


def test_progress_reaches_the_end_and_cancel_stops_between_matrices(tiny_model: LoadedModel) -> None:
    seen: list[JobState] = []
    recipe = Recipe.for_model(tiny_model, RtnConfig())
    compress(tiny_model, recipe, job=Job(seen.append))
    assert seen[-1].done == seen[-1].total > 0
    assert [s.done for s in seen] == sorted(s.done for s in seen)

    job = Job(lambda state: job.cancel() if state.done > state.total / 2 else None)
    with pytest.raises(Cancelled):
        compress(tiny_model, recipe, job=job)


@pytest.mark.parametrize(
    ("config", "encoding", "low", "high"),
    [
        (BnbNf4Config(), Nf4, 4.5, 4.5),
        (BnbNf4Config(block_size=32), Nf4, 5.0, 5.0),
        (BnbNf4Config(double_quant=True), Nf4, 4.13, 4.2),
        (BnbInt8Config(), Int8, 8.2, 8.6),
    ],
)
def test_bitsandbytes_stores_saves_and_runs(
    wide_model: LoadedModel, tmp_path: object, config: MethodConfig, encoding: type, low: float, high: float
) -> None:
    result = made(wide_model, config)
    assert all(isinstance(e, encoding) for e in result.linears.values())
    assert low <= result.effective_bits <= high
    assert result.engines == ("reference",)
    assert made(wide_model, config).sha256 == result.sha256
    read = CompressedModel.load(result.save(f"{tmp_path}/m"))
    assert read.sha256 == result.sha256
    first, second = to_model(result), to_model(read)
    with torch.no_grad():
        assert torch.equal(first.module(TOKENS).logits, second.module(TOKENS).logits)
    # The kernels' own rounding of activations is small beside what the codes do.
    worst = divergence(wide_model, to_model(made(wide_model, RtnConfig(bits=3))))
    assert 0 < divergence(wide_model, first) < worst


def test_later_text_does_not_change_earlier_int8_outputs(wide_model: LoadedModel) -> None:
    rebuilt = to_model(made(wide_model, BnbInt8Config()))
    changed = TOKENS.clone()
    changed[0, 40:] += 20
    with torch.no_grad():
        first, second = (rebuilt.module(t).logits[0, :40] for t in (TOKENS, changed))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_a_shape_that_nf4_cannot_run_is_refused_before_the_work(tiny_model: LoadedModel) -> None:
    seen: list[JobState] = []
    with pytest.raises(EngineError, match="must divide the row"):
        compress(tiny_model, Recipe.for_model(tiny_model, BnbNf4Config()), job=Job(seen.append))
    assert not seen
