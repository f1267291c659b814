"""A DOUBLE of transformer-engine, for tests on machines without a GPU. It is not transformer-engine.

Written from the Python source of transformer-engine 2.11: the names, signatures and orders of calls that megatron-core
0.16.1 and libs.parallel.fp8_linear use, with arithmetic on the CPU in the place of its CUDA kernels. What a GPU adds
(kernels, streams, cuBLAS's own demands) is not in it. What it keeps of the original, because mistakes show there:

* a weight has its bytes twice, in rows and transposed; backward multiplies by the transposed copy, which is as old as
  the last `post_all_gather_processing`;
* scales of a weight come from the largest entries of all ranks' shards, one per tensor or one per block;
* a weight without an FP8 context, tokens or widths that do not fit, and an unknown recipe are errors;
* initial values in high precision are kept beside the weight until they are cleared.
"""

from tests.support.te_double.install import install

__all__ = ["install"]
