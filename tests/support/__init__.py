"""What several test folders share. Never imported by shipped code."""
