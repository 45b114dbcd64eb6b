"""A run of the bench: what it asks, in which order, what it keeps on the disk, and how it goes on after a kill."""
