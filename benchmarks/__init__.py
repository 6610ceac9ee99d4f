"""Benchmarks of detr_fast: ``pytest benchmarks/ --benchmark``."""
