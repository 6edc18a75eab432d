"""Criteria of heads and neurons against derivatives taken by hand, streamed and resumed; quality of predictors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.analysis.mask_quality import PredictorQuality, agreement, spearman
from workbench.analysis.masking import MaskKind, masking
from workbench.analysis.profile import run
from workbench.analysis.sparsity import CRITERIA, UnitCriteria, pooled_criteria, score_units
from workbench.errors import InputError
from workbench.formats.mask_predictor import MaskPart, MaskPredictor, mask_groups
from workbench.models import LoadedModel
from workbench.progress import Job
from workbench.runtime.plan import Tap

FAMILIES = ("llama", "opt", "phi3", "gemma3_text")  # gated with grouped heads; ReLU without a gate; fused; four norms


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def scores_of(model: LoadedModel, ids: torch.Tensor, criteria: tuple[str, ...] = CRITERIA) -> dict:
    found: dict[tuple[int, str, str], torch.Tensor] = {}

    def sink(block: int, kind: MaskKind, scores: Mapping[str, torch.Tensor]) -> None:
        for name, values in scores.items():
            assert (block, kind, name) not in found
            found[block, kind, name] = values.clone()

    score_units(model, ids, criteria, sink)
    return found


def gate_slopes(model: LoadedModel, ids: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
    """dL/dm at m = 1 of a mask m on every unit at every token, by automatic differentiation."""
    arch = model.architecture
    sizes: dict[MaskKind, int] = {"heads": arch.n_heads, "neurons": arch.n_neurons}
    masks = {
        (block, kind): torch.ones(*ids.shape, size, requires_grad=True)
        for block in range(arch.n_blocks)
        for kind, size in sizes.items()
    }
    with masking(model, (), lambda tap, x: None, lambda block, kind: masks[block, kind]):
        logits = model.module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return {key: mask.grad for key, mask in masks.items() if mask.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_criteria_are_slopes_of_a_mask(make_model: Callable[..., LoadedModel], family: str) -> None:
    """``plainact`` is the size of the loss's derivative by a mask on the unit, ``fisher`` its square."""
    model = make_model(family)
    ids = torch.tensor([tokens(12), tokens(12, 1)])
    found, slopes = scores_of(model, ids), gate_slopes(model, ids)
    assert len(slopes) == 2 * model.architecture.n_blocks
    for (block, kind), slope in slopes.items():
        # The head of the output may round products to bf16: 2 % of the largest.
        tolerance = 0.02 * float(slope.abs().max())
        assert (found[block, kind, "plainact"] - slope.abs()).abs().max() < tolerance
        assert torch.allclose(found[block, kind, "fisher"], found[block, kind, "plainact"].square())
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_value_criteria_are_what_units_hold_and_write(make_model: Callable[..., LoadedModel], family: str) -> None:
    model, arch = make_model(family), make_model(family).architecture
    ids = torch.tensor([tokens(10)])
    found = scores_of(model, ids, ("magnitude", "preactivation", "weighted"))
    held: dict[Tap, torch.Tensor] = {}
    taps = [
        Tap(kind, block) for block in range(arch.n_blocks) for kind in ("attention_output", "mlp_inner", "mlp_input")
    ]
    with torch.no_grad(), masking(model, taps, lambda tap, x: held.update({tap: x.reshape(10, -1)}), lambda b, k: None):
        model.module.base_model(input_ids=ids, use_cache=False)
    for block in range(arch.n_blocks):
        heads = held[Tap("attention_output", block)].view(10, arch.n_heads, -1)
        neurons = held[Tap("mlp_inner", block)]
        o = model.linear_module(f"blocks.{block}.o").weight.detach()
        down = model.linear_module(f"blocks.{block}.down").weight.detach()
        for head in range(arch.n_heads):
            columns = o[:, head * arch.head_dim : (head + 1) * arch.head_dim]
            wrote = (heads[:, head] @ columns.T).norm(dim=1)
            assert torch.allclose(found[block, "heads", "weighted"][0, :, head], wrote, rtol=1e-3, atol=1e-5)
        assert torch.allclose(found[block, "heads", "magnitude"][0], heads.norm(dim=2), rtol=1e-4)
        assert torch.equal(found[block, "neurons", "magnitude"][0], neurons.abs())
        assert torch.allclose(found[block, "neurons", "weighted"][0], neurons.abs() * down.norm(dim=0), rtol=1e-4)
        unit = arch.unit(f"blocks.{block}.gate_up").linears[0]
        with torch.no_grad():
            before = model.linear_module(unit.id)(held[Tap("mlp_input", block)])[:, : arch.n_neurons].abs()
        assert torch.allclose(found[block, "neurons", "preactivation"][0], before, atol=1e-5)


def test_a_closed_neuron_matters_nothing_but_before_its_activation(make_model: Callable[..., LoadedModel]) -> None:
    """The published baseline ranks neurons by values that a ReLU then closes."""
    found = scores_of(make_model("opt"), torch.tensor([tokens(16)]))
    closed = found[1, "neurons", "magnitude"] == 0
    assert 0.2 < closed.float().mean() < 0.8
    assert (found[1, "neurons", "plainact"][closed] == 0).all()
    assert (found[1, "neurons", "preactivation"][closed] > 0).all()


def test_gradients_see_later_tokens_and_values_do_not(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    one, other = tokens(20), [*tokens(20)[:12], *tokens(8, 3)]
    a, b = (scores_of(model, torch.tensor([text]))[1, "neurons", "magnitude"][0, :12] for text in (one, other))
    assert torch.allclose(a, b, atol=1e-6)
    a, b = (scores_of(model, torch.tensor([text]))[1, "neurons", "plainact"][0, :11] for text in (one, other))
    assert not torch.allclose(a, b, rtol=0.01)


def test_a_batch_is_its_texts(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    texts = [tokens(16, seed) for seed in range(3)]
    together = scores_of(model, torch.tensor(texts), ("plainact", "weighted"))
    for row, text in enumerate(texts):
        for key, alone in scores_of(model, torch.tensor([text]), ("plainact", "weighted")).items():
            assert torch.allclose(together[key][row], alone[0], rtol=0.03, atol=1e-4 * float(alone.max()))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_means_are_those_of_the_steps_and_parts_are_the_whole(
    make_model: Callable[..., LoadedModel], family: str
) -> None:
    windows = [tokens(14), tokens(20, 1)]
    make = lambda **more: UnitCriteria(make_model(family), windows, first=4, **more)  # noqa: E731
    whole = run(make())
    resumed = pd.concat([make().compute(part, Job()) for part in reversed(make().parts)], ignore_index=True)
    resumed = resumed.sort_values("sequence", kind="stable").reset_index(drop=True)
    pd.testing.assert_frame_equal(whole.table, resumed)
    steps = run(make(steps=True)).table
    arch = make_model(family).architecture
    assert len(steps) == (10 + 16) * arch.n_blocks * (arch.n_heads + arch.n_neurons)
    keys = ["sequence", "block", "kind", "unit"]
    means = steps.groupby(keys)[list(CRITERIA)].mean()
    assert np.allclose(means, whole.table.set_index(keys).loc[means.index, list(CRITERIA)], rtol=1e-4)
    pooled = pooled_criteria(whole).set_index(keys[1:])
    direct = steps.groupby(keys[1:])[list(CRITERIA)].mean()
    assert np.allclose(pooled.loc[direct.index, list(CRITERIA)], direct, rtol=1e-4)
    assert make().provenance.key != make(loss="own").provenance.key


def test_own_tokens_are_drawn_by_the_seed(make_model: Callable[..., LoadedModel]) -> None:
    model, windows = make_model(), [tokens(14)]
    a, b, c = (
        run(UnitCriteria(model, windows, criteria=("fisher",), loss="own", seed=seed)).table for seed in (0, 0, 1)
    )
    pd.testing.assert_frame_equal(a, b)
    assert not np.allclose(a["fisher"], c["fisher"])


def test_what_cannot_be_scored_is_refused(make_model: Callable[..., LoadedModel]) -> None:
    model = make_model()
    with pytest.raises(InputError, match="Did you mean 'plainact'"):
        UnitCriteria(model, [tokens(9)], criteria=("plainakt",))
    with pytest.raises(InputError, match="more than 8 tokens"):
        UnitCriteria(model, [tokens(8)], first=8)
    with pytest.raises(InputError, match="0 to 2"):
        UnitCriteria(model, [tokens(9)], blocks=[3])
    with pytest.raises(InputError, match="two tokens"):
        score_units(model, torch.tensor([[1]]), ("plainact",), lambda *_: None)
    with torch.no_grad():
        model.module.get_output_embeddings().weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        run(UnitCriteria(model, [tokens(9)], criteria=("plainact",)))


def test_rank_correlation_and_recall() -> None:
    rng = np.random.default_rng(0)
    static = rng.random(50) * 10
    moving = rng.normal(size=(40, 50))
    found = agreement(static + moving, static + rng.normal(size=(40, 50)), static, static, 0.5)
    assert np.mean(found["spearman"]) > 0.85  # some units always matter more
    assert abs(np.mean(found["spearman_demeaned"])) < 0.05  # and that is all that was predicted
    assert np.mean(found["recall"]) <= np.mean(found["static_recall"])
    exact = agreement(static + moving, static + moving, static, static, 0.5)
    assert np.allclose(exact["spearman"], 1)
    assert np.allclose(exact["recall"], 1)
    assert np.mean(exact["spearman_demeaned"]) > 0.9
    assert np.isnan(spearman(np.ones((1, 4)), rng.random((1, 4)))).all()


def exact_predictor(model: LoadedModel, block: int) -> MaskPredictor:
    """Of ``magnitude``, for the last block alone; no more than its mean."""
    arch = model.architecture
    groups = mask_groups(arch, range(block, arch.n_blocks))
    units = sum(group.size for group in groups)
    part = MaskPart(
        "attention_output",
        0,
        (0, len(groups)),
        np.zeros((1, arch.n_heads * arch.head_dim), np.int8),
        np.ones(1, np.float32),
        np.zeros(1, np.float32),
        np.zeros((units, 1), np.int8),
        np.ones(units, np.float32),
        np.zeros(units, np.float32),
    )
    facts = {"criterion": "magnitude", "predictor": "unified", "scope": "every", "n": 4, "prefix": 8}
    ones = np.ones(len(groups), np.float32)
    return MaskPredictor(facts, block, (part,), ones, np.tile(np.linspace(0, 1, 8, dtype=np.float32), (2, 1)), {})


def test_quality_of_a_predictor_of_means(make_model: Callable[..., LoadedModel]) -> None:
    """One that predicts each unit's mean has its rank correlation, and none when means are taken off."""
    model = make_model("opt")
    windows = [tokens(32, seed) for seed in range(4)]
    blank = exact_predictor(model, 2)
    means = pooled_criteria(run(UnitCriteria(model, windows, criteria=("magnitude",), first=8)))
    means = means[means["block"] == 2].sort_values(["kind", "unit"], kind="stable")["magnitude"].to_numpy(np.float32)
    part = MaskPart(**{**vars(blank.parts[0]), "mean": means})
    predictor = MaskPredictor(blank.facts, 2, (part,), blank.scale, blank.quantiles, {})
    analysis = PredictorQuality(model, predictor, windows, sparsity=0.5)
    table = run(analysis).table
    assert table["step"].unique().tolist() == [8, 12, 16, 20, 24, 28]
    assert len(table) == 4 * 6 * 2
    assert table["spearman"].mean() > 0.3
    assert table["spearman_demeaned"].isna().all()
    assert (table["recall"] - table["static_recall"]).abs().mean() < 0.1
    pd.testing.assert_frame_equal(
        table[table["sequence"] == 2].reset_index(drop=True), analysis.compute("sequence-2", Job())
    )
    with pytest.raises(InputError, match="two windows"):
        PredictorQuality(model, predictor, windows[:1])
