"""From a model's config and matrices to the decoder of the compute kernels.

The kernels know no model by name: what differs between families (norms, positions, gates, windows, scales) is
translated here into data, from the same configs that transformers reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import EngineError
from workbench.models.base import Architecture
from workbench.progress import Job
from workbench.runtime.cpu_columns import column_units, set_columns
from workbench.runtime.cpu_integer import input_of
from workbench.runtime.cpu_source import GROUP_KINDS, INTEGER_KINDS, Matrix, Source
from workbench.runtime.plan import (
    ConstantMask,
    Consumer,
    LinearLevels,
    NormLevels,
    Plan,
    PositionTable,
    PredictedMask,
    ProjectionLevels,
    ProjectionMask,
    Threshold,
)

if TYPE_CHECKING:
    from workbench.formats.compressed import CompressedModel
    from workbench.models.base import LoadedModel

_FUNCTIONS = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Channels that share one int8 activation scale. Measured on SmolLM2-135M at 4 bits: KL to fp32 activations 0.0099 with
# blocks of 64, 0.0053 with 32, 0.0030 with 16, at 7 % of the decoding speed. gate and up gain the least from 16 and are
# half of the work of a prefill.
_BLOCK, _BLOCKS = 16, {"gate": 32, "up": 32}
_ROW_KINDS = {"f32", "dense", "groups", "affine", "superblocks"}  # that can lie row by row
# Rows of group codes take twice the instructions of tiles. Measured on one Zen 4 core, 4 bits in groups of 64, weights
# from memory: a row of a tile 9 to 10 ns, one by itself 19 ns where all are read, 12 at half of them and 6 at 3 of 10
# (per row of the matrix); a whole step of a 135M model still took 1.05 of the dense one at 3 of 10.
_SPARSE = 0.2
_MIN_GROUP = 8  # smaller groups would be padded to more bytes than bf16 takes


def kernels() -> ModuleType:
    """Return the compiled kernels.

    Raises:
        EngineError: the package was installed without them.
    """
    try:
        from workbench.runtime import _cpu
    except ImportError as error:
        raise EngineError(
            f"The cpu engine was not built ({error}): install a C++20 compiler (Debian: apt-get install g++), then "
            "install this package again. The reference engine runs without it."
        ) from error
    return _cpu


def check(target: LoadedModel | CompressedModel) -> None:
    """Raise ``EngineError`` where the decoder cannot run a model; its weights are not looked at, their kinds are."""
    from workbench.models.base import LoadedModel

    if isinstance(target, LoadedModel):
        config: Mapping[str, Any] = target.module.config.to_dict()
        if target.device.type != "cpu" or str(target.dtype) not in ("torch.float32", "torch.bfloat16"):
            raise EngineError(
                f"The cpu engine runs float32 and bfloat16 models on the cpu, this one is {target.dtype} on "
                f"{target.device}: load it so, or use the reference engine."
            )
    else:
        config = target.config
        if "cpu" not in target.engines:
            raise EngineError(f"The cpu engine cannot run these weights: they need one of {', '.join(target.engines)}.")
    _positions(config, target.architecture)
    _function(target.architecture.activation)


def build(
    source: Source,
    plan: Plan,
    *,
    exact: bool,
    threads: int,
    cores: Sequence[int] = (),
    isa: str = "auto",
    planes: bool = False,
    columns: bool | None = None,
    job: Job | None = None,
) -> Any:
    """Build the decoder of a model.

    Args:
        source: its numbers.
        plan: decisions to take while decoding.
        exact: fp32 activations and cache, else int8 activations (bf16 for bf16 weights, fp32 for weights in tables)
            and fp16 cache.
        threads: of the decoder, the caller's included.
        cores: processor of each thread, or none.
        isa: ``auto``, ``portable``, ``avx2``, ``avx512``, ``avx512bf16`` or ``amx``.
        planes: keep group codes as bit-planes and not packed.
        columns: lay units with input thresholds out input by input, all or none; None for those where it pays at the
            share of inputs that the plan expects them to leave out. A policy that moves thresholds moves no weights.
        job: progress.

    Raises:
        EngineError: something of this model or plan that the engine does not run.
    """
    job = job or Job()
    core = kernels()
    arch = source.architecture
    config = source.config
    ropes, of_block = _positions(config, arch)
    try:
        engine = core.Engine(
            blocks=arch.n_blocks,
            hidden=arch.hidden_size,
            heads=arch.n_heads,
            kv_heads=arch.n_kv_heads,
            head_dim=arch.head_dim,
            neurons=arch.n_neurons,
            vocab=arch.vocab_size,
            context=arch.context_length,
            layer_norm=arch.family == "opt",
            epsilon=float(config.get("rms_norm_eps", 1e-5)),  # torch.nn.LayerNorm's default is OPT's
            function=_function(arch.activation),
            gated=arch.gated,
            embedding_scale=float(np.float32(math.sqrt(arch.hidden_size))) if arch.family == "gemma3" else 1.0,
            attention_scale=float(config.get("query_pre_attn_scalar", arch.head_dim)) ** -0.5,
            softcap=float(config.get("final_logit_softcapping") or 0.0),
            rotary_dim=2 * len(ropes[0][0]) if ropes else 0,
            position_offset=2 if arch.family == "opt" else 0,
            exact=exact,
            threads=threads,
            cores=list(cores),
            isa=isa,
        )
        for frequencies, factor in ropes:
            engine.add_rope(frequencies, factor)
        for block, (rope, window) in enumerate(of_block):
            engine.set_attention(block, rope, window)
        by_row = _blocks_by_row(source, plan, arch, planes)
        # What a mask of neurons leaves out lies in rows, what a threshold of inputs leaves out in columns.
        wanted = column_units(plan, arch) if columns is not False and not planes else {}
        for block in by_row:
            wanted.pop(f"blocks.{block}.gate_up", None)
        laid_out = partial(set_columns, threads=threads, always=columns is True)
        offsets = _matrices(engine, source, arch, planes, by_row, wanted, laid_out, job)
        _vectors(engine, source, arch, offsets)
        _plan(engine, plan, arch)
        engine.finish()
    except (ValueError, IndexError) as error:
        raise EngineError(f"The cpu engine cannot run this model: {error}") from error
    return engine


def _function(name: str) -> str:
    if name not in _FUNCTIONS:
        raise EngineError(
            f"The cpu engine has no activation '{name}' (it has {', '.join(sorted(_FUNCTIONS))}): use the reference "
            "engine."
        )
    return _FUNCTIONS[name]


# Positions ------------------------------------------------------------------------------------------------------------


def _positions(
    config: Mapping[str, Any], arch: Architecture
) -> tuple[list[tuple[np.ndarray, float]], list[tuple[int, int]]]:
    """Rotary tables (frequencies, factor), and per block its table (-1: none) and window (0: all positions)."""
    if config.get("attn_logit_softcapping"):
        raise EngineError("The cpu engine has no soft cap on attention scores: use the reference engine.")
    if arch.family == "opt":
        return [], [(-1, 0)] * arch.n_blocks
    kinds = config.get("layer_types") or ["sliding_attention" if config.get("sliding_window") else "full_attention"]
    if len(kinds) == 1:
        kinds = kinds * arch.n_blocks
    window = int(config.get("sliding_window") or 0)
    parameters = config.get("rope_parameters") or {}
    by_kind = parameters if any(isinstance(v, Mapping) for v in parameters.values()) else None
    used = sorted(set(kinds)) if by_kind is not None else ["all"]
    tables = [_rope((by_kind or {}).get(kind, parameters), config, arch) for kind in used]
    return tables, [
        (used.index(kind) if by_kind is not None else 0, window if kind == "sliding_attention" else 0) for kind in kinds
    ]


def _rope(parameters: Mapping[str, Any], config: Mapping[str, Any], arch: Architecture) -> tuple[np.ndarray, float]:
    """Frequencies of one kind of rotary positions, in radians per position, as transformers computes them."""
    kind = parameters.get("rope_type", "default")
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    share = float(parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
    dim = int(arch.head_dim * share)
    frequencies = 1.0 / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    if kind == "linear":
        frequencies = frequencies / np.float32(parameters["factor"])
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind != "default":
        raise EngineError(f"The cpu engine has no rotary positions of type '{kind}': use the reference engine.")
    return frequencies.astype(np.float32), 1.0


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    factor, original = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    wavelength = 2 * math.pi / frequencies.astype(np.float64)
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - smooth) * frequencies / factor + smooth * frequencies).astype(np.float32)


# Weights --------------------------------------------------------------------------------------------------------------


def _blocks_by_row(source: Source, plan: Plan, arch: Architecture, planes: bool) -> set[int]:
    """Blocks whose gate and up lie row by row, so that masked neurons are not read: those of one width, without planes.

    Dense weights do wherever a mask acts on them. Group codes do where at most ``_SPARSE`` of the neurons are expected.
    Where a mask acts on others, tiles of 16 neurons are left out that are masked as a whole.
    """
    found = set()
    for consumer in plan.consumers:
        if consumer.kind != "neurons" or planes:
            continue
        unit = arch.unit(f"{consumer.target}.gate_up")
        kinds = {source.kind(linear.id) for linear in unit.linears}
        read_wider = any(c.kind == "width" and c.target == unit.id for c in plan.consumers)
        dense = kinds <= {"f32", "dense"}
        if kinds <= _ROW_KINDS and not read_wider and (dense or _expected(consumer, plan, arch) <= _SPARSE):
            found.add(unit.linears[0].block)
    return found


def _expected(consumer: Consumer, plan: Plan, arch: Architecture) -> float:
    """Share of neurons that a consumer is expected to compute."""
    if consumer.expected is not None:
        return consumer.expected
    program = plan.decider(consumer.slot).program
    if isinstance(program, ConstantMask):
        return float(np.mean(program.values[consumer.offset : consumer.offset + arch.n_neurons]))
    return 1.0


def _matrices(
    engine: Any,
    source: Source,
    arch: Architecture,
    planes: bool,
    by_row: Collection[int],
    columns: Mapping[str, float],
    laid_out: Callable[..., bool],
    job: Job,
) -> dict[str, np.ndarray]:
    """Hand over all matrices; return what integer ones add to their products, by linear id.

    Units in ``columns``, with the share of inputs that they leave out, are laid out input by input where ``laid_out``
    takes them so, gate and up of the blocks ``by_row`` row by row.
    """
    offsets = {}
    job.stage("prepare weights", len(arch.linears))
    for unit in arch.units:
        parts = []
        for linear in unit.linears:
            matrix = source.matrix(linear.id)
            if matrix.kind in INTEGER_KINDS and "offset" in matrix.tensors:
                offsets[linear.id] = matrix.tensors["offset"]
            parts += [(f"blocks.{linear.block}.{role}", part) for role, part in _split(linear.role, matrix, arch)]
            job.advance()
        if unit.id not in columns or not laid_out(engine, parts, left_out=columns[unit.id]):
            rows = unit.kind == "gate_up" and unit.block in by_row
            for name, part in parts:
                _set(engine, name, part, planes, rows)
    if source.has_output():
        _set(engine, "output", source.matrix("output"), False)
    _set(engine, "embedding", source.matrix("embedding"), False)
    return offsets


def _rows_of(role: str, arch: Architecture) -> dict[str, tuple[int, int]]:
    """Where the rows of fused linears lie."""
    queries, keys = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    if role == "qkv":
        return {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    if role == "gate_up":
        return {"gate": (0, arch.n_neurons), "up": (arch.n_neurons, 2 * arch.n_neurons)}
    return {}


def _split(role: str, matrix: Matrix, arch: Architecture) -> Iterator[tuple[str, Matrix]]:
    parts = _rows_of(role, arch)
    if not parts:
        yield role, matrix
    for name, (first, last) in parts.items():
        yield name, matrix.rows(first, last)


def _set(engine: Any, name: str, matrix: Matrix, planes: bool, by_row: bool = False) -> None:
    t = {part: np.ascontiguousarray(tensor) for part, tensor in matrix.tensors.items()}
    block = _BLOCKS.get(name.rpartition(".")[2], _BLOCK)
    if matrix.kind == "f32":
        engine.set_f32(name, t["weight"], by_row)
    elif matrix.kind == "dense":
        engine.set_bf16(name, t["weight"], by_row)
    elif matrix.kind in INTEGER_KINDS:
        engine.set_integer(name, input_of(matrix), t["codes"], t["scales"].view(np.uint16))
    elif matrix.kind == "nested-tables":
        tables = [(b, t[f"table_{b}"].view(np.uint16)) for b in matrix.meta["widths"]]
        engine.set_tables(name, t["codes"], int(matrix.meta["shape"][1]), tables[-1][0], tables)
    elif matrix.kind == "superblocks":
        size, block = int(matrix.meta["group_size"]), int(matrix.meta["block"])
        scales = _product(t["super_scales"], t["scales"], block // size)
        low = -_product(t["super_minima"], t["minima"], block // size) if "minima" in t else None
        shape, bits = matrix.meta["shape"], int(matrix.meta["bits"])
        engine.set_groups(
            name, t["codes"], int(shape[1]), bits, size, scales32=scales, minima32=low, block=block, by_row=by_row
        )
    elif matrix.kind in GROUP_KINDS:
        group = int(matrix.meta["group_size"])
        if group < min(_MIN_GROUP, int(matrix.meta["shape"][1])):
            raise EngineError(
                f"'{name}' has groups of {group}: the cpu engine runs groups of {_MIN_GROUP} and more. Compress with "
                "larger groups, or use the reference engine."
            )
        inputs = int(matrix.meta["shape"][1])
        if matrix.kind == "nested":
            widths = [(b, t[f"scales_{b}"].view(np.uint16), t[f"zeros_{b}"]) for b in matrix.meta["widths"]]
            engine.set_groups(name, t["codes"], inputs, widths[-1][0], group, planes=True, widths=widths, block=block)
            return
        engine.set_groups(
            name,
            t["codes"],
            inputs,
            int(matrix.meta["bits"]),
            group,
            scales16=t["scales"].view(np.uint16),
            zeros=t.get("zeros"),
            minima16=t["minima"].view(np.uint16) if "minima" in t else None,
            planes=planes,
            block=block,
            by_row=by_row,
        )
    else:
        raise EngineError(
            f"'{name}' is stored as '{matrix.kind}', which the cpu engine does not run: use the reference engine."
        )


def _product(of_block: np.ndarray, of_group: np.ndarray, groups: int) -> np.ndarray:
    """Scales of groups, fp32: 11 bits times 8 bits are exact."""
    return np.repeat(of_block.astype(np.float32), groups, axis=1) * of_group.astype(np.float32)


def _vectors(engine: Any, source: Source, arch: Architecture, offsets: Mapping[str, np.ndarray]) -> None:
    """Norms, biases (with the offsets of integer products) and learned positions."""
    renamed = {"q": "q_norm", "k": "k_norm"}
    if not any(name.endswith(".pre_mlp") for name in arch.norms):
        renamed["post_attention"] = "pre_mlp"  # named for where it stands; it norms what the MLP reads
    for name, path in arch.norms.items():
        owner, _, role = name.rpartition(".")
        target = f"{owner}.{renamed.get(role, role)}" if owner else role
        weight = source.vector(f"{path}.weight")
        if weight is not None:
            # Gemma stores the difference from one.
            engine.set_vector(target, weight + np.float32(1) if arch.family == "gemma3" else weight)
        bias = source.vector(f"{path}.bias")
        if bias is not None:
            engine.set_vector(f"{target}.bias", bias)
    for linear in arch.linears:
        bias = source.vector(f"{linear.path}.bias") if linear.bias else None
        offset = offsets.get(linear.id)
        if offset is not None:
            bias = offset if bias is None else bias + offset
        if bias is None:
            continue
        parts = _rows_of(linear.role, arch) or {linear.role: (0, linear.out_features)}
        for role, (first, last) in parts.items():
            engine.set_vector(f"blocks.{linear.block}.{role}.bias", np.ascontiguousarray(bias[first:last]))
    if arch.family == "opt":
        table = source.vector("model.decoder.embed_positions.weight")
        if table is None:
            raise EngineError("This OPT model has no table of positions.")
        engine.set_vector("positions", table.reshape(-1))


# Plan -----------------------------------------------------------------------------------------------------------------


def _plan(engine: Any, plan: Plan, arch: Architecture) -> None:
    for linear_id, transforms in plan.transforms.items():
        linear = arch.linear(linear_id)
        for role in list(_rows_of(linear.role, arch)) or [linear.role]:
            name = f"blocks.{linear.block}.{role}"
            for transform in transforms:
                if transform.kind == "scale":
                    engine.add_scale(name, np.ascontiguousarray(transform.array, dtype=np.float32))
                elif transform.kind == "order":
                    engine.add_order(name, np.ascontiguousarray(transform.array, dtype=np.int64))
                else:
                    engine.add_rotation(name, np.ascontiguousarray(transform.array, dtype=np.float32))
    for decider in plan.deciders:
        program = decider.program
        at = {
            "tap": decider.tap.kind,
            "block": decider.tap.block,
            "scope": decider.scope.kind,
            "every": decider.scope.n,
            "initial": float(decider.default),
            "bytes": float(program.bytes),
        }
        if isinstance(program, PredictedMask):
            engine.add_predictor(**at, **_predictor(program))
            continue
        name, numbers, matrix = _program(program)
        engine.add_decider(
            **at,
            program=name,
            numbers=numbers,
            matrix=matrix,
            positions=list(getattr(program, "positions", ())),
            thresholds=list(getattr(program, "thresholds", ())),
            values=list(getattr(program, "level_values", ())),
            first=getattr(program, "first", 0),
        )
    for consumer in plan.consumers:
        engine.add_consumer(
            plan.slots.index(consumer.slot),
            consumer.kind,
            consumer.target,
            list(consumer.widths),
            list(consumer.levels),
            consumer.offset,
            [] if consumer.factors is None else np.asarray(consumer.factors, dtype=np.float32).tolist(),
        )


def _predictor(program: PredictedMask) -> dict[str, Any]:
    """A predictor's parts as the kernels take them."""
    vectors = ("hidden_steps", "hidden_bias", "row_steps", "mean")
    return {
        "hidden": np.ascontiguousarray(program.hidden),
        "rows": np.ascontiguousarray(program.rows),
        **{name: np.ascontiguousarray(getattr(program, name), dtype=np.float32) for name in vectors},
        "groups": [int(g) for g in program.groups],
        "thresholds": [float(t) for t in program.thresholds],
        "floors": [int(f) for f in program.floors],
        "first": program.first,
    }


def _program(program: Any) -> tuple[str, list[float], np.ndarray | None]:
    """Name, numbers and matrix of a program, as the kernels take them."""
    if isinstance(program, NormLevels):
        return "norm_levels", [], None
    if isinstance(program, ProjectionLevels):
        # Rows of the matrix, each followed by its step.
        rows = np.concatenate([program.matrix.astype(np.float32), program.steps.astype(np.float32)[:, None]], axis=1)
        return "projection_levels", [], np.ascontiguousarray(rows)
    if isinstance(program, LinearLevels):
        row = np.ascontiguousarray(program.weights, dtype=np.float32)[None]
        return "linear_levels", [program.bias, float(program.rms)], row
    if isinstance(program, ProjectionMask):
        return "projection_mask", [float(program.keep)], np.ascontiguousarray(program.matrix, dtype=np.float32)
    if isinstance(program, Threshold):
        return "threshold", [], None
    if isinstance(program, ConstantMask):
        return "constant_mask", [], np.ascontiguousarray(program.values, dtype=np.float32)[None]
    if isinstance(program, PositionTable):
        return "position_table", list(program.values), None
    raise EngineError(
        f"The cpu engine has no program '{type(program).__name__}': deciders run inside its step, without Python."
    )
