"""What two interventions in both orders come to: the error of the better order, and how much the order matters.

Neither says which order is better, and a pair that is bad in both has a sensitivity of 0: show both orders beside them.

Source: Kolbeinsson et al., arXiv 2407.06483, section 3; their notebook calls the two MCE and OI.
"""

from __future__ import annotations


def order_free_error(one: float, other: float, *, lower_is_better: bool = False) -> float:
    """Return the error of the better order.

    Args:
        one: A measure from 0 to 1 with the interventions in one order.
        other: The same in the other order.
        lower_is_better: Whether the measure is an error itself, such as the accuracy on knowledge to be unlearned.
    """
    return min(one, other) if lower_is_better else 1 - max(one, other)


def order_sensitivity(one: float, other: float) -> float:
    """Return how far a measure in one order is from that in the other."""
    return abs(one - other)
