"""What holds the update of a weight back: the keys and values of earlier edits, LyapLock, SPHERE, PRUNE."""
