"""What of a client's privacy is spent by noisy sums, by Renyi differential privacy.

Sources, recalled: Mironov, "Renyi Differential Privacy", CSF 2017 (the Gaussian mechanism, composition); Canonne,
Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020, proposition 12 (from it to epsilon
and delta). Google's dp-accounting has the same bound on a coarser grid of orders; a test compares the two where it is
installed.
"""

from __future__ import annotations

import math

ORDERS = [1 + 10 ** (power / 500) for power in range(-1500, 3001)]  # each gives a bound; the least one counts


def epsilon_of(releases: int, noise_multiplier: float, delta: float) -> float:
    """Returns the epsilon of so many sums with Gaussian noise, at a delta.

    Args:
        releases: sums that were made public; a client may be in all of them.
        noise_multiplier: z, the noise's deviation by the most that one client adds to a sum.
        delta: the chance that the bound does not hold.
    """
    if releases == 0:
        return 0.0
    spent = releases / (2 * noise_multiplier**2)
    rest = -math.log(delta)
    return max(0.0, min(a * spent + math.log1p(-1 / a) + (rest - math.log(a)) / (a - 1) for a in ORDERS))
