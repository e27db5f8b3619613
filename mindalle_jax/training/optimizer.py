"""AdamW or Muon with a cosine or constant schedule. Gradients are first clipped by their global norm."""

from collections.abc import Mapping
from typing import Any

import optax

from mindalle_jax.config.schema import OptimizerConfig
from mindalle_jax.errors import ConfigError

MUON_RMS = 0.2
"""Root mean square of a step of Muon at learning rate 1. It is about as large as with AdamW, so both can use the same
learning rate."""


def learning_rate(optimizer: OptimizerConfig, warmup_steps: int, max_steps: int) -> optax.Schedule:
    """Returns the learning rate of step i = 0, 1, ... as a function of i.

    The rate is base_lr * i / warmup_steps first. Then it stays base_lr ("constant"), or follows a cosine, and from
    max_steps on it is min_lr. Without warm-up the cosine is the original's schedule: min + (base - min)
    (1 + cos(pi i / max_steps)) / 2. Raises ConfigError for warmup_steps outside [0, max_steps) and for a base_lr of 0
    or less.
    """
    if not 0 <= warmup_steps < max_steps:
        raise ConfigError(
            f"training.warmup_steps {warmup_steps} must be below the number of steps, {max_steps}; 0 works"
        )
    if optimizer.base_lr <= 0:
        raise ConfigError(f"optimizer.base_lr must be over 0, not {optimizer.base_lr}")
    if optimizer.sched_type == "constant":
        after = optax.constant_schedule(optimizer.base_lr)
    else:
        lowest = optimizer.min_lr / optimizer.base_lr
        after = optax.cosine_decay_schedule(optimizer.base_lr, max_steps - warmup_steps, alpha=lowest)
    if not warmup_steps:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, optimizer.base_lr, warmup_steps), after], [warmup_steps])


def make_optimizer(
    optimizer: OptimizerConfig,
    schedule: optax.Schedule,
    decay: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> optax.GradientTransformation:
    """Returns the optimizer of parameters with these shapes by path. decay: "all" or "matrices", see TrainingConfig.

    Muon is from Jordan et al. 2024, with the scale of Liu et al. 2025 (arXiv:2502.16982), as in optax.contrib.
    """
    mask = {path: decay == "all" or _is_matrix(path) for path in shapes}
    b1, b2 = optimizer.betas
    if optimizer.opt_type == "muon":
        axes: Any = {path: _matrix_axes(path, shape) for path, shape in shapes.items()}
        rule = optax.contrib.muon(
            schedule, consistent_rms=MUON_RMS, weight_decay=optimizer.weight_decay,
            adam_b1=b1, adam_b2=b2, adam_weight_decay=optimizer.weight_decay if decay == "all" else 0.0,
            muon_weight_dimension_numbers=axes,
        )  # fmt: skip
    else:
        rule = optax.adamw(schedule, b1=b1, b2=b2, eps=1e-8, weight_decay=optimizer.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(optimizer.grad_clip_norm), rule)


def _matrix_axes(path: str, shape: tuple[int, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns the axes of a matrix for Muon. The other axes number several such matrices.

    Returns None for parameters that AdamW trains: all but matrices, heads, and kernels that read or write colors.
    """
    last = len(shape) - 1
    if not _is_matrix(path) or path.startswith("head"):
        return None
    if path.endswith("/kernel"):  # [in, out] or [y, x, in, out]
        return None if min(shape[-2:]) <= 3 else optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)
    return optax.contrib.MuonDimensionNumbers(last, last - 1)  # [..., out, in]


def _is_matrix(path: str) -> bool:
    """Returns whether vectors are multiplied by this weight: it is no bias, gain or embedding table."""
    return path.endswith(("/weight", "/kernel", "/lora_a", "/lora_b"))
