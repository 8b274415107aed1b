"""Fine-tuning: `resolve` checks an experiment, `loop` runs it, `step` is the compiled update."""
