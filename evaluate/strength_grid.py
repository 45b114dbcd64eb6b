"""The strengths that are looked at and the caps of the leagues, without torch: configurations name them as defaults."""

from __future__ import annotations

# At which strengths the dial scores an edit.
STRENGTHS = (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
# The grid of the search for the largest admitted strength: k / STEPS.
STEPS = 1024
# Largest rise of the loss on general text in each league of Hewitt et al. 2024, as a share of the untouched model's.
CAPS = (1e-3, 1e-4, 1e-5)
# Why an edit that was refused has no strength but 0.
NO_EDIT = "no edit was made"
