"""What the library costs and what it gives: ``make bench``, or ``python -m benchmarks``."""
