"""Plans of contextual sparsity for the tiny llama of the tests: 3 blocks, 4 heads, hidden 48, 96 neurons."""

from __future__ import annotations

import numpy as np

from workbench.runtime.plan import ConstantMask, Consumer, Decider, Plan, PredictedMask, Scope, Tap, Threshold

BLOCKS, HEADS, NEURONS, HIDDEN = 3, 4, 96, 48
UNITS = HEADS + NEURONS


def predictor(
    blocks: int, seed: int = 0, first: int = 0, width: int = HIDDEN, n_hidden: int = 24, floor: int = 1
) -> PredictedMask:
    """Heads, then neurons of each of ``blocks`` blocks; about half of the units are above the thresholds."""
    random = np.random.default_rng(seed)
    sizes = [HEADS, NEURONS] * blocks
    size = sum(sizes)
    return PredictedMask(
        hidden=random.integers(-127, 128, (n_hidden, width)).astype(np.int8),
        hidden_steps=random.uniform(0.001, 0.003, n_hidden).astype(np.float32),
        hidden_bias=random.normal(0, 0.1, n_hidden).astype(np.float32),
        rows=random.integers(-127, 128, (size, n_hidden)).astype(np.int8),
        row_steps=random.uniform(0.005, 0.01, size).astype(np.float32),
        mean=random.normal(0, 0.2, size).astype(np.float32),
        groups=np.concatenate([[0], np.cumsum(sizes)]),
        thresholds=tuple(float(t) for t in random.normal(0, 0.1, len(sizes))),
        floors=np.array([floor, 3 * floor] * blocks),
        first=first,
    )


def consumers(slot: str, blocks: range) -> tuple[Consumer, ...]:
    """Heads and neurons of blocks, from one slot that holds them one block after the other."""
    found = []
    for i, block in enumerate(blocks):
        found.append(Consumer(slot, "heads", f"blocks.{block}", offset=UNITS * i))
        found.append(Consumer(slot, "neurons", f"blocks.{block}", offset=UNITS * i + HEADS))
    return tuple(found)


def predicted_plan(scope: Scope, first: int = 0) -> Plan:
    """One predictor at the output of the first block's attention, for all blocks after it."""
    decider = Decider("masks", Tap("attention_output", 0), predictor(BLOCKS - 1, first=first), scope, default=1)
    return Plan((decider,), consumers("masks", range(1, BLOCKS)))


def per_block_plan() -> Plan:
    """A predictor in every block, from what the block reads, each token."""
    return Plan(
        tuple(
            Decider(f"masks.{i}", Tap("block_input", i), predictor(1, seed=i), Scope("token"), default=1)
            for i in range(BLOCKS)
        ),
        tuple(c for i in range(BLOCKS) for c in consumers(f"masks.{i}", range(i, i + 1))),
    )


def constant_plan(share: float, first: int = 0, seed: int = 5) -> Plan:
    """A random mask that leaves out a share of all heads and neurons, always the same."""
    kept = np.random.default_rng(seed).random(UNITS * BLOCKS) >= share
    mask = ConstantMask(kept.astype(np.float32), first=first)
    return Plan(
        (Decider("masks", Tap("residual", 0), mask, Scope("token"), default=1),), consumers("masks", range(BLOCKS))
    )


def threshold_plan(cut: float, factors: bool) -> Plan:
    """Small inputs of two units left out, by a factor of each channel or without."""
    random = np.random.default_rng(3)
    widths = {"blocks.1.gate_up": HIDDEN, "blocks.2.down": NEURONS}
    deciders = [Decider(unit, Tap("residual", 0), Threshold((cut,), first=2), Scope("token")) for unit in widths]
    return Plan(
        tuple(deciders),
        tuple(
            Consumer(
                unit,
                "input_threshold",
                unit,
                factors=random.uniform(0.2, 2, width).astype(np.float32) if factors else None,
            )
            for unit, width in widths.items()
        ),
    )


MASK_PLANS = {
    "token": lambda: predicted_plan(Scope("token"), first=3),
    "every": lambda: predicted_plan(Scope("every", 4)),
    "reply": lambda: predicted_plan(Scope("reply")),
    "blocks": per_block_plan,
    "constant": lambda: constant_plan(0.5, first=2),
}
