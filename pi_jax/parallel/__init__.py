"""The device mesh, sharding rules, array placement, and start-up of several processes."""
