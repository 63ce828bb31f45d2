"""Evaluation: benchmarks, scorers, runner."""
