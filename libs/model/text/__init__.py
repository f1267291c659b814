"""Text side of a model: tokenizer, the document layout, and the reader of built data directories.

Not for building data (see `apps.train.data`).
"""
