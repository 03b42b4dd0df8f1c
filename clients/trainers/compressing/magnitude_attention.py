"""Magnitude attention: while masks move, pruned weights stay in the network, each by how large it still is.

After Back, Ahn and Kim, "Magnitude Attention-based Dynamic Pruning", Expert Systems with Applications 276, 2025: that
attention is a function of magnitude, acts forward and backward, and that exploration precedes exploitation is the
paper's; the function below is ours, since its equations were not to be had. No figure here is the paper's.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from clients.trainers.compressing.gradual import GradualRun, GradualTrainer
from devices.compression.masks import attended, masked
from fedsim.messages.updates import Broadcast

ATTENTION_COPIES = 1.3


class AttentionRun(GradualRun):
    """The local loop, exploring until masks are final.

    Attributes:
        explores: whether pruned weights take part.
    """

    def __init__(self, trainer: GradualTrainer, client: Any, broadcast: Broadcast):
        super().__init__(trainer, client, broadcast)
        self.explores = broadcast.round <= trainer.last_pruning

    def settle(self, broadcast: Broadcast) -> None:
        super().settle(broadcast)
        self.explores = False


class MagnitudeAttentionTrainer(GradualTrainer):
    """Exploration with w (m + (1 - m) A) while masks move, its gradient times the same; then exploitation with w m.

    A = |w| / max |w| of the layer, without a gradient of its own. Exploration ends with `prune_rounds`: give it about
    six tenths of all rounds. Clients are judged with w m at any time.

    Args:
        attention: "magnitude" is A as above; "none" is A = 0, gradual pruning, and "all" A = 1, dense training, until
            masks are final.
        gradual: arguments of GradualTrainer.
    """

    run = AttentionRun

    def __init__(self, attention: Literal["magnitude", "none", "all"] = "magnitude", **gradual: Any):
        super().__init__(**gradual)
        self.attention = attention

    def masked(self, run: GradualRun, weight: Tensor, mask: Tensor) -> Tensor:
        """Returns a weight as a training step has it."""
        assert isinstance(run, AttentionRun)
        return attended(weight, mask, self.attention) if run.explores else masked(weight, mask)

    def weight_copies(self, run: GradualRun) -> float:
        """Counts the attention beside the mask."""
        assert isinstance(run, AttentionRun)
        return super().weight_copies(run) + (ATTENTION_COPIES if run.explores else 0.0)
