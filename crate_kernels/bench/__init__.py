"""Measurements of operators and models. Results are checked first, timed in alternation, written as JSON, and rendered
as tables."""
