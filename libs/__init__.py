"""The parts. Imports point one way only (checked by import-linter):

    model > parallel > kernels > flags

flags     gates, run log, audit chain, environment: no torch, the only reader of the process environment
kernels   operators, one folder each: api, reference (the oracle), one file per backend
parallel  everything that knows about megatron-core and process groups
model     the hybrid language model, its text and its checkpoints
"""
