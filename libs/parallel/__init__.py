"""The only layer that imports megatron-core: datasets on disk now, process groups and tensor parallelism as they land."""
