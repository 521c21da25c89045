"""Optimizers on local shards, the global gradient norm, and the learning-rate schedule."""
