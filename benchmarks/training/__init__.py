"""Training of the methods that are trained: what they learn from, the loop, and the command."""
