"""A page on this machine: edit, look, undo."""
