"""The scan for XLA devices: plain torch operations of static shape around one loop over chunks.

`body` is one chunk, `scan` the whole sequence. Neither needs torch_xla to be imported, so both are checked on the CPU.
"""
