"""Linear algebra on plain tensors: solvers, null spaces, sums of Gram matrices."""
