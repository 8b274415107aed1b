"""`--smoke`: an experiment in miniature."""

import dataclasses
import time

from pi_jax.config.schema import BUILTIN, Config, MeshConfig
from pi_jax.rope import Default


def smoke(config: Config) -> Config:
    """The same experiment in miniature: every code path, a model and text that fit in seconds on a laptop.

    It keeps RoPE kind and factor, packing, masks, precision and schedule, and, if the config states an architecture,
    its theta, weight tying and grouping of heads. A config that starts from a folder starts from a tiny one. The base
    window becomes 64 tokens, the training window 64 times the factor. The mesh becomes all local devices along fsdp and
    gradient accumulation at most 2 microbatches, so that it runs on any machine; flags such as `--mesh.context 2` still
    apply. Each smoke run gets its own folder.
    """
    accumulation = min(config.compute.gradient_accumulation_steps, 2)
    factor = config.rope.factor
    window = int(64 * factor)
    model = config.model
    if config.train.init_from:
        model = None
    elif model is not None:
        model = dataclasses.replace(
            model,
            vocab_size=260,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2 if model.num_key_value_heads < model.num_attention_heads else 4,
            head_dim=16,
            max_position_embeddings=64,
            original_max_position_embeddings=None,
            rope=Default(model.rope.theta),
            bos_token_id=256,
            eos_token_id=257,
        )
    return dataclasses.replace(
        config,
        model=model,
        data=dataclasses.replace(
            config.data,
            sources=(BUILTIN,),
            window=64 if config.data.pose_window else window,
            pose_window=window if config.data.pose_window else 0,
            batch_size=8 * accumulation,
            prefetch=2,
        ),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3, warmup_steps=2),
        train=dataclasses.replace(
            config.train,
            init_from=BUILTIN if config.train.init_from else "",
            output=config.train.output + time.strftime("-smoke-%H%M%S"),
            steps=8,
        ),
        checkpoint=dataclasses.replace(
            config.checkpoint, every=4, export_hf_every=4 if config.checkpoint.export_hf_every else 0
        ),
        evaluate=dataclasses.replace(
            config.evaluate,
            every=4 if config.evaluate.every else 0,
            data=(BUILTIN,),
            windows=tuple(sorted({64, window})),
            stride=32,
            max_tokens=4 * window,
            passkey_lengths=(512,) if config.evaluate.passkey_lengths else (),  # of bytes: the prompt alone has 400
            passkey_distances=2,
            passkey_trials=2,
        ),
        compute=dataclasses.replace(
            config.compute,
            loss_chunk=min(config.compute.loss_chunk, window // 2),
            gradient_accumulation_steps=accumulation,
        ),
        mesh=MeshConfig(),
        logging=dataclasses.replace(config.logging, every=2),
    )
