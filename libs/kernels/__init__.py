"""Operators, a folder each: one public signature (`api`), one oracle (`reference`), one file per backend.

A backend states what it can run; an explicit choice that cannot run raises, and `auto` resolves once to a
`Choice(value, reason)` that callers log. Nothing here reads the environment or imports megatron.
"""
