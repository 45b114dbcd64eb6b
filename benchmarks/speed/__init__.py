"""Each fast path timed against a plain one, with the agreement of their results."""
