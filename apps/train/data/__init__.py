"""From C++ repositories to packed windows: `fathom data build`, `fathom data inspect`, and the training
loader.

Not for reading a built directory in general (see `libs.model.text.shards`), which evaluation does too.
"""
