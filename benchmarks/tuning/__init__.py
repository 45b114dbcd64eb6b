"""Search for a method's settings on a few facts of a dataset, and compare them on others."""
