"""`fathom checkpoint`: look at what a run has saved, and take a model out of it. Not for saving (apps.train.save)."""
