"""Sweeps over arms and seeds: running them, their results, and benchmarks."""
