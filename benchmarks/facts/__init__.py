"""A file of facts kept as edits."""
