"""Benchmarks as cases: one reader per file format, and the testbed's own."""
