"""What GRACE and its kin share: keys with radii, the positions that a value replaces, the order of training."""
