"""Interleaved comparisons of training speed on the CPU: ours against hand-written code and torch's own parallelism.

python -m benchmarks [--only NAME] [--size S] [--pairs N]
"""
