"""A web page on this machine to make edits, look at what they did, and undo them."""
