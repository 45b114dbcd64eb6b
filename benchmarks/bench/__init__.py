"""One run of the bench: its configuration, what it asks, the order of edits, and how it goes on after a kill."""
