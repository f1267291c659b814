"""`fathom serve`: a checkpoint behind an OpenAI-compatible HTTP endpoint. The map is README.md."""
