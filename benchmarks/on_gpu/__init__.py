"""What ``benchmarks/gpu.py`` measures: one module per kind of measurement, each with its ceiling beside it."""
