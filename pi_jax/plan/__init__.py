"""Memory, FLOPs and collectives of a train step, compiled for hardware you don't have."""
