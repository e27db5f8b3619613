"""Networks in miniature for the recipes of scripts/, and what their tests share."""

from pathlib import Path

# One image for each of the eight devices of these tests.
LOOP = [
    "experiment.total_batch_size=8", "experiment.valid_batch_size=8", "optimizer.max_steps=2",
    "training.warmup_steps=1", "training.checkpoint_every_steps=1", "training.validate_every_steps=2",
    "data.threads=1",
]  # fmt: skip


def tiny_changes(ctx_len_txt: int) -> dict[str, list[str]]:
    """Changes to the configurations of a recipe, whose images stay 64 x 64: nothing is learned in so few updates."""
    return {
        "vqgan": [
            *LOOP, "experiment.local_batch_size=1", "training.sample_every_steps=0", "training.quantise_from_step=1",
            "training.restart_after_steps=1", "optimizer.max_steps=9",
            "stage1.embed_dim=4", "stage1.n_embed=64",
            "stage1.hparams={z_channels: 8, resolution: 64, ch: 8, ch_mult: [1, 1, 1, 2], num_res_blocks: 1, "
            "attn_resolutions: [], num_groups: 4}",
        ],
        "transformer": [
            *LOOP,
            "stage2.hparams={embed_dim: 16, n_layers: 1, n_heads: 2, ctx_len_img: 64, "
            f"ctx_len_txt: {ctx_len_txt}}}",
        ],
        "clip": [
            *LOOP, "clip.projection_dim=8",
            "clip.text={hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
            "max_position_embeddings: 32}",
            "clip.vision={image_size: 64, patch_size: 16, hidden_size: 16, intermediate_size: 16, "
            "num_hidden_layers: 1, num_attention_heads: 2}",
        ],
    }  # fmt: skip


def weights(work: Path) -> dict[str, bytes]:
    """Every file of weights but checkpoints."""
    files = sorted(path for path in work.rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {str(path.relative_to(work)): path.read_bytes() for path in files}
