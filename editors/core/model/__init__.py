"""Read a model: its parts, its tokens, its activations, batches of rows, and the settings and texts of its folder."""
