"""Scales of input channels that cost nothing at run time: their inverse is folded into what comes before.

``y = W x = (W diag(s)) (x / s)``. The division moves into the operation that makes x, which differs by unit:

* ``qkv`` and ``gate_up``: the norm before them, its weight (and bias) divided by s.
* ``down``: the rows of ``up``, divided by s. Behind a gate that is exact; without one it is where the activation is
  positively homogeneous (ReLU), since then f(u / s) = f(u) / s.
* ``o``: the rows of ``v``. With grouped heads one row of v feeds a channel of each query head of its group, so these
  share one scale (the geometric mean of theirs).

Otherwise (GELU without a gate) the unit's inputs stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from workbench.models.base import Architecture, Linear, LoadedModel, Unit

_NORMS = {"qkv": ("input",), "gate_up": ("pre_mlp", "post_attention")}  # the first that a block has


@dataclass(frozen=True)
class Fold:
    """Where the inverse of a unit's input scale goes: a norm, or rows of a linear.

    Attributes:
        norm: module path of a norm, or None.
        offset: what the norm adds to its stored weight before it multiplies (Gemma's norms multiply by 1 + w).
        linear: whose rows are divided, or None.
        rows: which of them; as many as there are distinct scales.
        heads, repeats, head_dim: channel ``(g * repeats + r) * head_dim + d`` of the unit's input comes from row
            ``g * head_dim + d``. One head without repeats where channels and rows agree.
    """

    norm: str | None = None
    offset: float = 0.0
    linear: Linear | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    heads: int = 1
    repeats: int = 1
    head_dim: int = -1

    def tie(self, scales: torch.Tensor) -> torch.Tensor:
        """Return scales (in,) that this fold can take: those that share a row become their geometric mean."""
        if self.repeats == 1:
            return scales
        grouped = scales.view(self.heads, self.repeats, self.head_dim)
        return grouped.log().mean(1, keepdim=True).exp().expand_as(grouped).reshape(-1)

    def of_rows(self, scales: torch.Tensor) -> torch.Tensor:
        """Return one scale per row of tied scales (in,)."""
        if self.repeats == 1:
            return scales
        return scales.view(self.heads, self.repeats, self.head_dim)[:, 0].reshape(-1)


def find_fold(architecture: Architecture, unit: Unit) -> Fold | None:
    """Return where a unit's input scales can go, or None where nothing before it takes them."""
    if unit.kind in _NORMS:
        paths = [architecture.norms.get(f"blocks.{unit.block}.{name}") for name in _NORMS[unit.kind]]
        path = next((path for path in paths if path is not None), None)
        return None if path is None else Fold(norm=path, offset=1.0 if architecture.family == "gemma3" else 0.0)
    linears = {x.role: x for x in architecture.linears if x.block == unit.block}
    if unit.kind == "down":
        if not architecture.gated and architecture.activation != "relu":
            return None
        return _rows(linears, "up", "gate_up", architecture.n_neurons)
    keys = architecture.n_kv_heads * architecture.head_dim
    fold = _rows(linears, "v", "qkv", keys)
    repeats = architecture.n_heads // architecture.n_kv_heads
    if fold is None or repeats == 1:
        return fold
    heads, dim = architecture.n_kv_heads, architecture.head_dim
    return Fold(linear=fold.linear, rows=fold.rows, heads=heads, repeats=repeats, head_dim=dim)


def _rows(linears: dict[str, Linear], role: str, fused: str, count: int) -> Fold | None:
    """Rows of a linear, or the last rows of the one that it is fused into."""
    if role in linears:
        return Fold(linear=linears[role], rows=slice(0, count))
    if fused in linears:
        rows = linears[fused].out_features
        return Fold(linear=linears[fused], rows=slice(rows - count, rows))
    return None


def fold_norm(values: torch.Tensor, scales: torch.Tensor, offset: float) -> torch.Tensor:
    """Return a norm's stored weight (hidden,) so that its outputs are divided by scales (hidden,)."""
    return (values + offset) / scales - offset


@dataclass
class Folded:
    """A dense model with some inputs scaled: the same function in other weights. The model itself stays as it is.

    Attributes:
        scales: by unit id, (in,).
        columns: by linear id, what its columns are multiplied by, (in,).
        rows: by linear id, what its rows and its bias are divided by, (out,).
        vectors: replaced norms and biases, by state-dict name.
    """

    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LoadedModel, scales: Mapping[str, torch.Tensor]) -> Folded:
        """Fold tied scales (in,), by unit id, of units that have a place for them."""
        folded = cls()
        for unit in model.architecture.units:
            if unit.id in scales:
                folded.scale(model, unit, scales[unit.id])
        return folded

    def weight(self, linear: Linear, weight: torch.Tensor) -> torch.Tensor:
        """Return a linear's dense weights (out, in) as they are after folding, in its dtype."""
        if linear.id in self.columns:
            weight = weight * self.columns[linear.id].to(weight)
        if linear.id in self.rows:
            weight = weight / self.rows[linear.id].to(weight).unsqueeze(1)
        return weight

    def scale(self, model: LoadedModel, unit: Unit, scales: torch.Tensor) -> None:
        """Multiply the columns of a unit's linears by tied scales (in,), and fold the inverse away.

        A unit is scaled once, and only where ``find_fold`` finds a place.
        """
        fold = find_fold(model.architecture, unit)
        if fold is None or unit.id in self.scales:
            raise ValueError(f"{unit.id} cannot be scaled")
        state = model.module.state_dict()
        self.scales[unit.id] = scales
        for linear in unit.linears:
            self.columns[linear.id] = scales
        if fold.norm is not None:
            for name, offset in ((f"{fold.norm}.weight", fold.offset), (f"{fold.norm}.bias", 0.0)):
                if name in state:
                    values = self.vectors.get(name, state[name])
                    self.vectors[name] = fold_norm(values.detach().to("cpu", scales.dtype), scales, offset)
            return
        if fold.linear is None:
            raise ValueError("a fold has a norm or a linear")
        factors = self.rows.get(fold.linear.id, torch.ones(fold.linear.out_features, dtype=scales.dtype)).clone()
        factors[fold.rows] *= fold.of_rows(scales)
        self.rows[fold.linear.id] = factors
        name = f"{fold.linear.path}.bias"
        if fold.linear.bias:
            self.vectors[name] = state[name].detach().to("cpu", scales.dtype) / factors
