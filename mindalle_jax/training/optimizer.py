"""AdamW with a cosine schedule, and the order of what happens to a gradient: clipped by global norm, then AdamW."""

from collections.abc import Mapping

import optax

from mindalle_jax.config import OptimizerConfig
from mindalle_jax.errors import ConfigError


def learning_rate(optimizer: OptimizerConfig, warmup_steps: int, max_steps: int) -> optax.Schedule:
    """Rate of update i = 0, 1, ...: base_lr * i / warmup_steps, then a cosine that is at min_lr from max_steps on.

    Without warm-up it is the original's: min + (base - min) (1 + cos(pi i / max_steps)) / 2.
    """
    if not 0 <= warmup_steps < max_steps:
        raise ConfigError(f"training.warmup_steps {warmup_steps} must be below the number of updates, {max_steps}")
    if optimizer.base_lr <= 0:
        raise ConfigError(f"optimizer.base_lr must be over 0, not {optimizer.base_lr}")
    cosine = optax.cosine_decay_schedule(
        optimizer.base_lr, max_steps - warmup_steps, alpha=optimizer.min_lr / optimizer.base_lr
    )
    if not warmup_steps:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, optimizer.base_lr, warmup_steps), cosine], [warmup_steps])


def make_optimizer(
    optimizer: OptimizerConfig,
    schedule: optax.Schedule,
    decay: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> optax.GradientTransformation:
    """The optimizer of parameters of these shapes by path. decay: see TrainingConfig."""
    mask = {path: decay == "all" or _is_matrix(path) for path in shapes}
    b1, b2 = optimizer.betas
    return optax.chain(
        optax.clip_by_global_norm(optimizer.grad_clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=1e-8, weight_decay=optimizer.weight_decay, mask=mask),
    )


def _is_matrix(path: str) -> bool:
    """Whether it is a weight that vectors are multiplied with: no bias, gain or table of embeddings."""
    return path.endswith(("/weight", "/kernel", "/lora_a", "/lora_b"))


def count_steps(config_max_steps: int, images: int, batch_size: int, epochs: int) -> int:
    """Updates of a run: optimizer.max_steps, or where that is 0 (images // batch_size) * epochs, as the original."""
    steps = config_max_steps or images // batch_size * epochs
    if steps < 1:
        raise ConfigError(
            f"{images} pictures are fewer than experiment.total_batch_size {batch_size}: no update would be made; "
            f"at most {images} would work"
        )
    return steps
