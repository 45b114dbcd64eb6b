"""What a run leaves on the disk, and how it is read back: folders, results, status, sweeps, trackers."""
