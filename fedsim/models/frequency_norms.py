"""What is done to spectrograms by frequency, where a microphone shows: norms without parameters, and mixed styles.

Tensors are [batch, channels, frequencies, frames]. Nothing here is learned or kept, so that nothing is sent: clients
with other microphones have no statistics in common that an average could spoil.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Interval
from torch import Tensor, nn

from fedsim.errors import ConfigError

NormIn = Literal["none", "resnorm", "rfn", "ifn"]
Share = Annotated[float, Interval(ge=0, le=1)]
Positive = Annotated[float, Gt(0)]
EPSILON, STYLE_EPSILON = 1e-5, 1e-6
USUAL = {"resnorm": 0.1, "rfn": 0.5}  # weights of what keeps the microphone


def frequency_norm(kind: NormIn, weight: float | None = None) -> list[nn.Module]:
    """Makes the norm that a network applies to its input and behind each stage: one module, or none at all.

    Args:
        kind: resnorm, rfn (relaxed instance frequency-wise), ifn (rfn with weight 0), or none.
        weight: lambda, of the part that keeps what the frequencies have in common; None: 0.1 of resnorm, 0.5 of rfn.

    Raises:
        ConfigError: for a weight where the norm has none.
    """
    if kind not in USUAL:
        if weight is not None:
            raise ConfigError(
                f"model.norm_weight is for resnorm and rfn, and model.norm_in={kind} has none: set it to null"
            )
        return [RelaxedNorm(0.0)] if kind == "ifn" else []
    weight = USUAL[kind] if weight is None else weight
    return [ResidualNorm(weight) if kind == "resnorm" else RelaxedNorm(weight)]


def mixed_styles(rate: float, alpha: float) -> list[nn.Module]:
    """Makes what mixes the styles of a share of the batches: one module, or none at all."""
    return [FreqMixStyle(rate, alpha)] if rate else []


def chain(*layers: nn.Module) -> nn.Sequential:
    """Chains layers; their numbers, which name the weights, are the same with and without what this module makes."""
    named: OrderedDict[str, nn.Module] = OrderedDict()
    for place, layer in enumerate(layers):
        ours = isinstance(layer, ResidualNorm | RelaxedNorm | FreqMixStyle)
        named[f"by_frequency_{place}" if ours else str(sum(name.isdigit() for name in named))] = layer
    return nn.Sequential(named)


class ResidualNorm(nn.Module):
    """y = lambda x + x normalised over channels and frames, each frequency of each clip by itself.

    Args:
        weight: lambda.
    Source: Kim et al., "Domain Generalization on Efficient Acoustic Scene Classification using Residual
        Normalization", 2021 (arXiv 2111.06531); 0.1 is recalled and in public code.
    """

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape of x [batch, channels, frequencies, frames]."""
        return self.weight * x + _normalised(x, (1, 3))


class RelaxedNorm(nn.Module):
    """y = lambda LN(x) + (1 - lambda) IFN(x): normalised by clip, and by clip and frequency.

    Args:
        weight: lambda; 0 is instance frequency-wise normalisation, 1 a layer norm without weights.
    Source: Kim et al., "Towards Robust Domain Generalization in 2D Neural Audio Processing" (RFN), Interspeech 2022
        (arXiv 2206.12513), as in public code; 0.5 and the places are recalled.
    """

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape of x [batch, channels, frequencies, frames]."""
        by_frequency = _normalised(x, (1, 3))
        return torch.lerp(by_frequency, _normalised(x, (1, 2, 3)), self.weight) if self.weight else by_frequency


def _normalised(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * (variance + EPSILON).rsqrt()


class FreqMixStyle(nn.Module):
    """In training, gives clips means and deviations by frequency between their own and those of others in the batch.

    A batch is mixed with probability `rate`, as a whole; x -> s (x - mean) / deviation + m, where m and s lie between
    those of the clip and of a random other one, by a draw from Beta(alpha, alpha) for each clip.

    In a federation a batch is one client's: it has that client's microphone only, unless its data have several.

    Args:
        rate: share of batches that are mixed.
        alpha: of the Beta distribution; small ones leave most clips near their own style, or another's.
    Source: Schmid et al., "CP-JKU Submission to DCASE22", technical report 2022, `mixstyle` of their public code
        (there 0.6 and 0.3), after Zhou et al., "Domain Generalization with MixStyle", ICLR 2021, and Kim et al., 2022.
    """

    def __init__(self, rate: float, alpha: float):
        super().__init__()
        self.rate, self.alpha = rate, alpha

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape of x [batch, 1, frequencies, frames]; draws from torch's own generator."""
        if not self.training:
            return x
        # All is drawn and computed for every batch, on the CPU: a step has one cost, and devices draw alike.
        is_mixed = torch.rand(1) < self.rate
        own = torch.distributions.Beta(self.alpha, self.alpha).sample((len(x), 1, 1, 1)).to(x)
        other = torch.randperm(len(x)).to(x.device)
        variance, mean = torch.var_mean(x.detach(), (1, 3), keepdim=True)
        deviation = (variance + STYLE_EPSILON).sqrt()
        mixed_mean, mixed_deviation = (torch.lerp(s[other], s, own) for s in (mean, deviation))
        return torch.where(is_mixed.to(x.device), (x - mean) / deviation * mixed_deviation + mixed_mean, x)
