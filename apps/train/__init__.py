"""Training: one loop for every lane; recipes differ, the loop does not.

`fathom train` is `apps.train.__main__`; the README beside this file tells how a step runs and
what may be resumed.
"""
