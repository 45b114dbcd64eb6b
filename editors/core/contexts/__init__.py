"""Facts that are read before a question: edits that change the prompt, and neither weights nor activations."""
