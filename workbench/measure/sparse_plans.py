"""Plans of contextual sparsity from a few JSON values, as benches ask for them, here and in the process that times.

What is asked for: ``kind``, ``inputs`` or a kind of mask (``runtime.masks``); ``sparsity``; ``prefix``, tokens that
masks leave whole (None: as the predictor was made); of masks without a predictor ``allocation`` and ``criterion``; of
predicted ones ``scope`` and ``n``; ``hold``, of inputs and of masks predicted more than once a reply, whether the share
is held on the sparsity (``runtime.share_control``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.errors import EngineError
from workbench.formats.compressed import CompressedModel
from workbench.formats.input_cuts import InputCuts
from workbench.formats.mask_predictor import MaskPredictor
from workbench.runtime.input_sparsity import input_plan, input_policy
from workbench.runtime.masks import mask_plan, mask_policy
from workbench.runtime.plan import Plan, Policy, Scope
from workbench.runtime.share_control import ShareController


def sparse_plan(model: CompressedModel, asked: Mapping[str, Any]) -> Plan:
    """The plan, for a model with the tables that it needs.

    Raises:
        EngineError, InputError: no such tables, or a sparsity that is not possible.
    """
    if asked["kind"] == "inputs":
        return input_plan(model.architecture, _cuts(model), asked["sparsity"])
    scope = asked.get("scope")
    return mask_plan(
        model.architecture,
        _predictor(model),
        asked["sparsity"],
        kind=asked["kind"],
        allocation=asked.get("allocation"),
        criterion=asked.get("criterion"),
        prefix=asked.get("prefix"),
        scope=None if scope is None else Scope(scope, asked.get("n", 1)),
    )


def sparse_policy(model: CompressedModel, asked: Mapping[str, Any]) -> Policy:
    """What an engine that runs a plan of the same ``layout_key`` is set to."""
    if asked["kind"] == "inputs":
        return input_policy(model.architecture, _cuts(model), asked["sparsity"])
    if asked["kind"] == "predicted":
        return mask_policy(model.architecture, _predictor(model), asked["sparsity"], allocation=asked.get("allocation"))
    return Policy()


def share_controller(
    model: CompressedModel, asked: Mapping[str, Any], *, first: int | None = None
) -> ShareController | None:
    """What holds the share where that is asked for and there is one, else None.

    ``first`` tokens of a text are not counted; None for those that stay whole.
    """
    if not asked.get("hold") or not asked["sparsity"]:
        return None
    if asked["kind"] == "inputs":
        return ShareController(model.architecture, _cuts(model), asked["sparsity"], first=first)
    first = asked.get("prefix") if first is None else first
    allocation = asked.get("allocation")
    return ShareController(model.architecture, _predictor(model), asked["sparsity"], first=first, allocation=allocation)


def layout_key(asked: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is alike where one engine, moved by its policy, serves as fast as one opened for each.

    Weights are laid out for a plan's sparsity: inputs for each its own, predicted masks alike up to 80 % of the neurons
    left out (``runtime.cpu_build``). Whether a share is held is the controller's matter alone.
    """
    moved = asked["kind"] == "predicted" and asked["sparsity"] < 0.8
    return tuple(sorted((k, v) for k, v in asked.items() if k != "hold" and not (moved and k == "sparsity")))


def _cuts(model: CompressedModel) -> InputCuts:
    if model.input_cuts is None:
        raise EngineError(f"{model.folder} cannot leave inputs out: compress it with 'input-sparsity'.")
    return model.input_cuts


def _predictor(model: CompressedModel) -> MaskPredictor:
    if model.mask_predictor is None:
        raise EngineError(f"{model.folder} has no mask predictor: compress it with 'predicted-sparsity'.")
    return model.mask_predictor
