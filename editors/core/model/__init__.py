"""What a model is made of: its parts, its tokens, its activations, and the settings and texts of its folder."""
