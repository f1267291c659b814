"""`fathom docs`: the parts of the documents that are made from the code.

A program of its own beside doctor and watch: it reads both `apps.train` and `apps.eval`, which may not know each other.
"""
