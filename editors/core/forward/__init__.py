"""Parts of a forward pass: suffixes behind shared prefixes, upper blocks, layer by layer, with edits laid over."""
