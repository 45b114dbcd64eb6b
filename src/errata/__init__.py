"""errata: correct single facts in a language model, undo any correction exactly, and measure what it cost."""
