"""The evidence for the adaptive-rank and tensor methods; `benchmarks/evidence.py` is its command."""
