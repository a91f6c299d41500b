"""Measurements of the operators and models: gated by correctness, interleaved, written as JSON, rendered as tables."""
