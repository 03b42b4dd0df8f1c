"""NaiveMix: mixup with the means of other clients' examples.

Source: Yoon et al., "FedMix", ICLR 2021, equation 1 (read in a third party's transcription).
"""

from __future__ import annotations

from clients.trainers.mixing.mixup import PoolTrainer


class NaiveMixTrainer(PoolTrainer):
    """Takes the mean of a group in the place of a partner: the loss at a mean is not the mean of losses.

    Args: see PoolTrainer.
    """
