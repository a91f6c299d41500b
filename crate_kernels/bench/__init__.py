"""Measurements of the operators and models: checked for correctness, interleaved, written as JSON, rendered as
tables."""
