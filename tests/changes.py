"""Configs with some fields changed, and runs in which something happens at a chosen step."""

import dataclasses

from pi_jax.data.pipeline import Pipeline


def with_changes(config, **sections):
    """The config with fields of its sections changed."""
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **changes) for name, changes in sections.items()}
    )


def at_step(monkeypatch, step, action):
    """Calls `action` when the loop reads the batch of a step, from 1."""
    real = Pipeline.batch

    def batch(self, index, rows=None):
        if index == step - 1:
            action()
        return real(self, index, rows)

    monkeypatch.setattr(Pipeline, "batch", batch)
    # Without threads that read ahead, the batch of a step is read when the step before has been dispatched.
    monkeypatch.setattr(
        Pipeline, "iterate", lambda self, first, rows: (self.batch(i, rows) for i in range(first, 10**6))
    )
