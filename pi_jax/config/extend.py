"""The architecture of an extended model."""

import dataclasses

from pi_jax.config.schema import ModelConfig, RopeConfig
from pi_jax.errors import InputError
from pi_jax.rope import build_scaling


def extend(model: ModelConfig, wanted: RopeConfig) -> ModelConfig:
    """Returns the architecture with RoPE scaled as `wanted` and the window multiplied by the factor.

    `RopeConfig()` (kind 'default') returns the model unchanged, scaled or not, and so does the scaling that it has.

    Raises:
      InputError: if the model is already scaled in another way and `wanted.stacking` is 'refuse' or does not apply to
        this model. Factors are never multiplied silently.
    """
    if wanted.kind == "default":
        return model
    original, longest = model.original_window, model.max_position_embeddings
    scaling = build_scaling(wanted.kind, model.rope.theta, wanted.factor, window=original, head_dim=model.head_dim)
    if scaling == model.rope:
        return model
    recorded = model.original_max_position_embeddings is not None
    if model.rope.kind != "default" or recorded:
        if wanted.stacking == "refuse":
            raise InputError(
                f"the model is already scaled, {model.rope} with a window of {longest}, and rope asks for {scaling}: "
                "set rope.stacking to 'compose' to multiply the factors or to 'replace' to drop the old scaling, or "
                "leave rope.kind at 'default' to keep it"
            )
        if wanted.stacking == "compose":
            if model.rope.kind != "linear" or wanted.kind != "linear":
                raise InputError(
                    f"rope.stacking is 'compose', which multiplies the factors of 'linear' and 'linear', but the model "
                    f"has {model.rope} and rope asks for {scaling}"
                )
            return dataclasses.replace(
                model,
                rope=dataclasses.replace(model.rope, factor=model.rope.factor * wanted.factor),
                max_position_embeddings=int(longest * wanted.factor),
            )
        if model.rope.kind == "default" or not recorded:
            raise InputError(
                f"rope.stacking is 'replace', but the model, {model.rope} with a window of {longest}, does not record "
                "the theta or the window it had before: start from the unscaled model"
            )
    extended = int(original * wanted.factor)
    return dataclasses.replace(
        model,
        rope=scaling,
        max_position_embeddings=extended,
        original_max_position_embeddings=original if extended > original else None,
    )
