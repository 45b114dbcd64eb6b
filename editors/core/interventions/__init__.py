"""Changes of a whole model that are no edits: pruning, quantisation, unlearning; and how they compose with edits."""
