"""Run only a part of a forward pass: the suffix of a row, the upper blocks, one layer after another, with an edit."""
