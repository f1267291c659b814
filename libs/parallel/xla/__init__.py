"""XLA devices behind one small interface: `device` opens them, `mesh` cuts tensors over them, `engine` trains on them,
`aot` compiles for a TPU that is not here. The map is README.md.

Modules that import torch_xla or jax say so; `pins`, `topology` and `cycles` need neither.
"""
