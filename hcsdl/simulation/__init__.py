"""Drawn plates in BBBC021's layout, for tests, demos and benchmarks."""

from hcsdl.simulation.writing import simulate

__all__ = ["simulate"]
