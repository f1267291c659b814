"""`fathom doctor`: what this machine can run, what is wrong with what is installed, and what to do about it.

A program of its own and not a part of `apps.train` or `apps.eval`: it must answer where neither can be imported.
"""
