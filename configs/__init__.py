"""Presets of training runs and models. A wheel holds this folder as mindalle_jax.configs."""
