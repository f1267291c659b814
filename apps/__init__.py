"""The programs. They use `libs` and never each other.

cli    `fathom ...`: dispatch only
train  data preparation, the training loop, recipes
eval   suites, benchmarks, the report
"""
