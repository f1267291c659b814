"""Layouts, process groups and what ranks exchange; the only layer that imports megatron-core. The map is README.md."""
