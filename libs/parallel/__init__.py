"""The only layer that imports megatron-core: its indexed dataset now; process groups and sharding as they land."""
