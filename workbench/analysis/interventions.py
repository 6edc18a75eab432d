"""What one channel or one value carries: set it to zero or to its mean, and measure what the output loses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import nn

from workbench.analysis.common import model_provenance
from workbench.analysis.dense_pass import DensePass
from workbench.analysis.profile import TextRecord
from workbench.errors import InputError
from workbench.models.base import LoadedModel
from workbench.progress import Job


@dataclass(frozen=True)
class Intervention:
    """One change.

    Attributes:
        site: a unit (its input) or ``blocks.<i>`` (the residual that enters the block).
        channel: of that site.
        how: zero, or the mean over all tokens of the windows.
        step: position of the only token that is changed; None for all.
    """

    site: str
    channel: int
    how: Literal["zero", "mean"] = "zero"
    step: int | None = None

    @property
    def name(self) -> str:
        return f"{self.site}[{self.channel}]{'' if self.step is None else f'@{self.step}'}={self.how}"


class Interventions:
    """KL divergence from the dense model, nats per token, under each change alone.

    The table has ``site``, ``block``, ``channel``, ``step`` (-1 for all), ``how``, ``kl`` and ``n_tokens``. Only the
    blocks from the change on are run again, so changes are best given in the order of blocks.

    Args:
        model: the dense model.
        windows: token windows.
        changes: what is changed, each alone.
        text: where the windows come from, for the record.

    Raises:
        InputError: no windows, or a site, channel or step that is not there.
    """

    def __init__(
        self,
        model: LoadedModel,
        windows: Sequence[Sequence[int]],
        changes: Sequence[Intervention],
        *,
        text: TextRecord | None = None,
    ) -> None:
        if not windows or not changes:
            raise InputError("Interventions need at least one window of text and one change.")
        self._model, self._windows = model, [list(window) for window in windows]
        self._changes = {change.name: change for change in changes}
        self._pass: DensePass | None = None
        for change in changes:
            self._check(change)
        parameters = {"windows": self._windows, "changes": [asdict(change) for change in changes]}
        self.provenance = model_provenance("interventions", model, text, 0, parameters)

    def _check(self, change: Intervention) -> None:
        module = self._place(change.site)[1][0]
        width = self._model.architecture.hidden_size
        if isinstance(module, nn.Linear):
            width = module.in_features
        if not 0 <= change.channel < width:
            raise InputError(f"{change.site} has channels 0 to {width - 1}, not {change.channel}.")
        longest = max(len(window) for window in self._windows)
        if change.step is not None and not 0 <= change.step < longest:
            raise InputError(f"The windows have steps 0 to {longest - 1}, not {change.step}.")

    def _place(self, site: str) -> tuple[int, list[nn.Module]]:
        """Block of a site, and the modules whose input it is."""
        arch = self._model.architecture
        head, _, index = site.partition(".")
        if head == "blocks" and index.isdigit() and int(index) < arch.n_blocks:
            return int(index), [self._model.block(int(index))]
        unit = arch.unit(site)
        return unit.block, [self._model.linear_module(linear.id) for linear in unit.linears]

    @property
    def parts(self) -> Sequence[str]:
        return list(self._changes)

    @torch.inference_mode()
    def compute(self, part: str, job: Job) -> pd.DataFrame:
        """Return one change's row."""
        change = self._changes[part]
        block, modules = self._place(change.site)
        if self._pass is None or self._pass.block > block:
            self._pass = DensePass(self._model, self._windows)
        self._pass.advance(block)
        value = self._mean(change, modules[0]) if change.how == "mean" else 0.0
        hooks = [m.register_forward_pre_hook(_setter(change, value), with_kwargs=True) for m in modules]
        try:
            kl = self._pass.kl()
        finally:
            for hook in hooks:
                hook.remove()
        row = (change.site, block, change.channel, -1 if change.step is None else change.step, change.how, kl)
        n_tokens = sum(len(window) for window in self._windows)
        return pd.DataFrame([(*row, n_tokens)], columns=["site", "block", "channel", "step", "how", "kl", "n_tokens"])

    def _mean(self, change: Intervention, module: nn.Module) -> float:
        """Mean of the channel over all tokens of all windows."""
        assert self._pass is not None
        seen: list[torch.Tensor] = []

        def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(_input(args, kwargs)[..., change.channel].flatten().double())

        hook = module.register_forward_pre_hook(see, with_kwargs=True)
        try:
            self._pass.kl()
        finally:
            hook.remove()
        return float(torch.cat(seen).mean())


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _setter(change: Intervention, value: float) -> Callable[..., Any]:
    def set_value(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = _input(args, kwargs).clone()
        x[..., slice(None) if change.step is None else slice(change.step, change.step + 1), change.channel] = value
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    return set_value
