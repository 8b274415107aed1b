"""Configs with some fields changed."""

import dataclasses


def with_changes(config, **sections):
    """The config with fields of its sections changed."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **changes) for name, changes in sections.items()}
    )
