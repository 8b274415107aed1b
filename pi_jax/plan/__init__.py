"""Memory, FLOPs and collectives of a train step, compiled for hardware that is not present."""
