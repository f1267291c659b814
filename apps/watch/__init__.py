"""`fathom watch`: a live page of a folder of runs. It reads what runs write, and writes nothing.

A program of its own: it needs no torch, and the standard library's server is enough for a page on localhost.
"""
