"""Edits of behaviour: affine changes of hidden states, directions learnt from contrast sets, and changes of weights."""
