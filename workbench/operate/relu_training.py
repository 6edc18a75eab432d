"""Train a small ReLU model on tokens, so that an interrupted training goes on and ends in the same bytes.

All that a step depends on is the state that a check keeps (weights, AdamW's moments, losses so far) and the number of
the step, from which its batch, dropout, learning rate and sparsity weight follow. States are safetensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch.nn import functional

from workbench.errors import InputError
from workbench.progress import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATIENCE = 5  # checks without a lower loss on watched text, after which training ends
_WARM_UP = 0.05  # share of the steps over which the learning rate rises
_FLOOR = 0.1  # of the learning rate, which the cosine ends at
_CLIP = 1.0  # norm of the gradient
_WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        steps: at most.
        batch: windows per step.
        length: tokens per window.
        learning_rate: the highest; it rises linearly and falls with a cosine.
        weight_decay: AdamW's, on matrices alone.
        sparsity: weight of the mean of all activations (they are not negative, so this is their L1 norm) in the loss.
            It rises with a sine from zero, as in ProSparse (Song et al. 2024): neurons first learn
            what they are for.
        check_every: steps between two checks of the loss on watched text, after each of which the state is kept.
        seed: of batches and dropout.
    """

    steps: int = 300
    batch: int = 4
    length: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    sparsity: float = 0.0
    check_every: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("length", 2), ("check_every", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} {getattr(self, name)} is not possible: it must be at least {least}.")
        for name in ("learning_rate", "weight_decay", "sparsity"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name == "learning_rate" and value == 0):
                raise InputError(f"{name} {value} is not possible: it must be a finite number from 0 up.")


class Place(Protocol):
    """Where states are kept; ``store.Checkpoint`` is one."""

    def read_bytes(self, part: str) -> bytes | None: ...
    def write_bytes(self, part: str, content: bytes, ending: str = ...) -> None: ...
    def drop(self, part: str) -> None: ...


@dataclass(frozen=True)
class Trained:
    """How a training went: one row per check, (step, mean training loss since the last, loss on watched text)."""

    checks: tuple[tuple[float, float, float], ...]

    @property
    def steps(self) -> int:
        return int(self.checks[-1][0])

    @property
    def best_step(self) -> int:
        """The step whose weights the module has now."""
        return int(self.checks[_best(self.checks)][0])


@dataclass(frozen=True)
class Seen:
    """What a model does on windows.

    Attributes:
        nll: mean negative log-likelihood, nats per token.
        zeros: by block, share of the MLP's neurons that are exactly zero, mean over tokens.
        silent: by block, share of the neurons that are zero at every token.
        n_tokens: predicted.
    """

    nll: float
    zeros: tuple[float, ...]
    silent: tuple[float, ...]
    n_tokens: int


@contextmanager
def activations(module: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collect the MLP's activations of every block of an OPT module, float (tokens, neurons), as passes make them."""
    found: list[torch.Tensor] = []
    layers = module.get_submodule("model.decoder.layers")
    hooks = [
        layer.get_submodule("activation_fn").register_forward_hook(
            lambda _module, _inputs, output: found.append(output)
        )
        for layer in layers.children()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def look(module: PreTrainedModel, windows: Sequence[Sequence[int]], job: Job) -> Seen:
    """Return the loss on windows and which neurons are zero there. All windows have one length; eval mode."""
    loss, n_tokens, positions = 0.0, 0, 0
    zeros: np.ndarray | int = 0
    awake: np.ndarray | bool = False
    for begin in range(0, len(windows), _WINDOWS_AT_ONCE):
        tokens = torch.tensor([list(window) for window in windows[begin : begin + _WINDOWS_AT_ONCE]])
        with activations(module) as found:
            logits = module(input_ids=tokens, use_cache=False).logits
        loss += _cross_entropy(logits, tokens, "sum").item()
        n_tokens += tokens[:, 1:].numel()
        positions += tokens.numel()
        zeros = zeros + np.array([(one == 0).sum().item() for one in found])
        awake = awake | np.array([(one != 0).any(dim=0).numpy() for one in found])
        job.check()
    shares = np.asarray(zeros) / (positions * np.asarray(awake).shape[1])
    silent = 1 - np.asarray(awake).mean(axis=1)
    return Seen(loss / n_tokens, tuple(shares.tolist()), tuple(silent.tolist()), n_tokens)


def train(
    module: PreTrainedModel,
    stream: np.ndarray,
    watched: Sequence[Sequence[int]],
    beginning: int,
    options: TrainingOptions,
    place: Place,
    job: Job,
) -> Trained:
    """Train a module in place, and leave it with the weights of the check whose loss on watched text was lowest.

    Training ends early after ``PATIENCE`` checks without a lower loss.

    Args:
        module: of OPT's architecture, fp32 on the CPU, with the weights to start from.
        stream: int64 (n,), the training text; windows are cut from it anywhere.
        watched: windows of other text, each beginning with ``beginning``.
        beginning: the token put before every window.
        options: how.
        place: keeps the state of the last check; asked first for one to go on from.
        job: advanced at every step.

    Raises:
        Cancelled: by ``job``; the state of the last check is kept.
    """
    names = [name for name, _ in module.named_parameters()]
    parameters = list(module.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    module.requires_grad_(True)
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95))
    checks: list[tuple[float, float, float]] = []
    best = [p.detach().clone() for p in parameters]
    kept = _last_state(place, options)
    if kept is not None:
        for name, parameter, lowest in zip(names, parameters, best, strict=True):
            parameter.data.copy_(kept[f"weights.{name}"])
            lowest.copy_(kept[f"best.{name}"])
        _restore(optimizer, kept)
        checks = [(row[0], row[1], row[2]) for row in kept["checks"].tolist()]
        done = int(checks[-1][0])
        job.note(f"Going on after an interrupted training, from step {done} of {options.steps}: its state is kept.")
    step = int(checks[-1][0]) if checks else 0
    job.stage("train the ReLU model", options.steps, done=step)
    losses: list[float] = []
    while step < options.steps and not _stuck(checks):
        losses.append(_step(module, optimizer, _batch(stream, beginning, options, step), options, step))
        step += 1
        if step % options.check_every == 0 or step == options.steps:
            module.eval()
            seen = look(module, watched, job)
            checks.append((float(step), float(np.mean(losses)), seen.nll))
            losses = []
            if _best(checks) == len(checks) - 1:
                best = [p.detach().clone() for p in parameters]
            state = {f"weights.{n}": p.detach() for n, p in zip(names, parameters, strict=True)}
            state |= {f"best.{n}": p for n, p in zip(names, best, strict=True)}
            _keep(place, state | _moments(optimizer), checks)
        job.advance()
    if step < options.steps:
        lowest_at = checks[_best(checks)][0]
        job.note(f"Stopped at step {step}: the loss on text held out has not fallen since step {lowest_at:.0f}.")
    for parameter, lowest in zip(parameters, best, strict=True):
        parameter.data.copy_(lowest)
    module.zero_grad(set_to_none=True)
    module.requires_grad_(False)
    module.eval()
    return Trained(tuple(checks))


def rate(options: TrainingOptions, step: int) -> float:
    """The learning rate at a step: a linear rise, then a cosine down to ``_FLOOR`` of the highest."""
    rise = max(1, round(_WARM_UP * options.steps))
    if step < rise:
        return options.learning_rate * (step + 1) / rise
    along = (step - rise) / max(1, options.steps - rise)
    return options.learning_rate * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * along)) / 2)


def _step(
    module: PreTrainedModel, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, options: TrainingOptions, step: int
) -> float:
    """One step of AdamW; returns the loss of the predictions alone."""
    module.train()
    for group in optimizer.param_groups:
        group["lr"] = rate(options, step)
    with torch.random.fork_rng(devices=[]), activations(module) as found:
        torch.manual_seed(_stream_seed(options.seed, step, "dropout"))
        logits = module(input_ids=tokens, use_cache=False).logits
    loss = _cross_entropy(logits, tokens, "mean")
    weight = options.sparsity * math.sin(math.pi / 2 * (step + 1) / options.steps)
    total = loss + weight * torch.stack([one.mean() for one in found]).mean() if weight else loss
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(module.parameters(), _CLIP)
    optimizer.step()
    return loss.item()


def _cross_entropy(logits: torch.Tensor, tokens: torch.Tensor, reduction: str) -> torch.Tensor:
    """Of each token but the first, given those before it."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


def _batch(stream: np.ndarray, beginning: int, options: TrainingOptions, step: int) -> torch.Tensor:
    """Windows of one step, int64 (batch, length), drawn from anywhere in the stream."""
    rng = np.random.default_rng(_stream_seed(options.seed, step, "batch"))
    begins = rng.integers(0, len(stream) - (options.length - 1) + 1, size=options.batch)
    rows = np.stack([stream[begin : begin + options.length - 1] for begin in begins])
    return torch.from_numpy(np.concatenate([np.full((options.batch, 1), beginning, dtype=np.int64), rows], axis=1))


def _stream_seed(seed: int, step: int, use: str) -> int:
    """A 63-bit seed of its own for every step and use."""
    return int.from_bytes(hashlib.sha256(f"{use}/{seed}/{step}".encode()).digest()[:8], "big") >> 1


def _best(checks: Sequence[tuple[float, float, float]]) -> int:
    """Index of the lowest loss on watched text, the first of equals."""
    return min(range(len(checks)), key=lambda i: checks[i][2])


def _stuck(checks: Sequence[tuple[float, float, float]]) -> bool:
    return bool(checks) and len(checks) - 1 - _best(checks) >= PATIENCE


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state: dict[int, dict[str, torch.Tensor]] = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": value for i, values in state.items() for key, value in values.items()}


def _restore(optimizer: torch.optim.Optimizer, kept: dict[str, torch.Tensor]) -> None:
    """Give the optimizer the moments that ``_moments`` named."""
    state: dict[str, Any] = optimizer.state_dict()
    for name, value in kept.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state["state"].setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(state)


def _keep(place: Place, tensors: dict[str, torch.Tensor], checks: Sequence[tuple[float, float, float]]) -> None:
    """Keep the state of the last check, then let go of the one before."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    tensors["checks"] = torch.tensor(checks, dtype=torch.float64)
    place.write_bytes(_part(int(checks[-1][0])), tensor_bytes(tensors))
    if len(checks) > 1:
        place.drop(_part(int(checks[-2][0])))


def _last_state(place: Place, options: TrainingOptions) -> dict[str, torch.Tensor] | None:
    """The state of the latest check that is kept and undamaged, None where there is none."""
    possible = {*range(options.check_every, options.steps, options.check_every), options.steps}
    for step in sorted(possible, reverse=True):
        content = place.read_bytes(_part(step))
        if content is not None:
            return read_tensors(content)
    return None


def _part(step: int) -> str:
    return f"state-{step}"
