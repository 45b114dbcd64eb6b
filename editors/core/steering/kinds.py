"""Names that can be chosen for edits of behaviour, without torch, so that commands can name them."""

from __future__ import annotations

PLACES = ("all", "prompt", "last", "prefix", "span")
ALIGNMENTS = ("front", "middle", "back")
# What of an example's text its activations are read at: the mean over the continuation's tokens, or the last token.
READS = ("mean", "last")
KINDS = ("caa", "ace", "leace", "ablate", "actadd", "iti", "surgery", "ablate_weights")
# The strength of each kind where none is given; None: it has none. That of ITI is the paper's.
STRENGTHS: tuple[tuple[str, float | None], ...] = (
    ("caa", 1.0),
    ("ace", 1.0),
    ("leace", 0.5),
    ("ablate", None),
    ("actadd", 1.0),
    ("iti", 15.0),
    ("surgery", 0.25),
    ("ablate_weights", None),
)
# Contrast sets that come with errata.
BUNDLED = ("formal",)
