"""Calculating with edits: scaled, negated, added, masked, merged. Functions of tensors, patches and entries."""
