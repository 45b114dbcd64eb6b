"""Traces of the facts of a dataset: averages with intervals, heat maps, files."""
