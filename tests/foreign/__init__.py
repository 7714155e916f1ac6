"""Patterns of other people's models, each rebuilt in a few lines, against per-sample autograd."""
