"""FedMix: mixup with all clients' examples, approximated to first order from their means alone.

Source: Yoon et al., "FedMix: Approximation of Mixup under Mean Augmented Federated Learning", ICLR 2021; the form of
the loss was read in a third party's transcription, and derived.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from clients.trainers.mixing.mixup import OWN, PARTNER, Entrance, Mixed, cross_entropy
from clients.trainers.mixing.naivemix import NaiveMixTrainer
from clients.trainers.mixing.tangents import jvp
from devices.cost import ModelCost
from devices.errors import one_line
from fedsim.errors import ConfigError
from fedsim.models.dropout import rewinding, seed_dropout
from fedsim.workloads.base import Tensors, Workload

TAYLOR = "taylor"
# Of `central_difference`, in lengths of an example: the cube root of float32's precision, where rounding and truncation
# are level. Finer ones are better in float64, but for smooth networks only (LSTM: 1e-10 of the gradient with 6e-6, 6e-7
# with this; LeNet-5: 1,650 and 11 times the gradient).
STEP = float(torch.finfo(torch.float32).eps ** (1 / 3))
KINKED = re.compile(  # operators whose derivative jumps, as autograd names their nodes
    "(Relu|LeakyRelu|Prelu|PreluKernel|Rrelu|Threshold|Hard[a-z]+|Softshrink|Abs|Clamp|ClampMin|ClampMax|Maximum|"
    "Minimum|Max|Min|Amax|Amin|Topk|Sort|(Mkldnn|Adaptive|Fractional)?MaxPool[A-Za-z0-9]*)Backward"
)
Logits = Callable[[Tensor], Tensor]
Terms = tuple[Tensor, Tensor, Tensor]  # mean losses for the own and the partner's label, and the slope


def double_backward(logits: Logits, u: Tensor, direction: Tensor, y: Tensor, partner_y: Tensor) -> Terms:
    """Takes the input gradient, kept differentiable, along the direction.

    Args:
        logits: the network, [batch, ...] to [batch, ..., classes].
        u: where, [batch, ...].
        direction: the same for all examples, [1, ...].
        y: class numbers, [batch] or [batch, steps].
        partner_y: probabilities, [1, ..., classes].

    Returns:
        The mean cross-entropy at u for both labels, and for y its derivative d/de at u + e * direction, e = 0. The mean
        already holds 1 / batch, so the products are summed: public re-implementations take their mean and are a factor
        of the batch too small.
    """
    if not u.requires_grad:
        leaf = u.detach().requires_grad_()
        u = leaf.view_as(leaf)  # torch's FLOP counter cannot follow a leaf
    z = logits(u)
    own = cross_entropy(z, y)
    (gradient,) = torch.autograd.grad(own, u, create_graph=True)
    return own, cross_entropy(z, partner_y), (gradient * direction).sum()


def forward_mode(logits: Logits, u: Tensor, direction: Tensor, y: Tensor, partner_y: Tensor) -> Terms:
    """Takes the derivative of the logits along the direction, which travels through the network with them.

    Arguments and results as in `double_backward`. The cross-entropy's own derivative is softmax - label.
    """
    z, slope = jvp(logits, u, direction)
    flat = slope.flatten(0, -2)
    rise = (z.flatten(0, -2).softmax(-1) * flat).sum(-1) - flat.gather(-1, y.reshape(-1, 1)).squeeze(-1)
    return cross_entropy(z, y), cross_entropy(z, partner_y), rise.mean()


def central_difference(
    logits: Logits,
    u: Tensor,
    direction: Tensor,
    y: Tensor,
    partner_y: Tensor,
    rewind: Callable[[], None] = lambda: None,
) -> Terms:
    """Takes differences of the loss a small step to both sides; losses at u are the means of the sides.

    Arguments and results as in `double_backward`, up to the square of STEP. It needs no second derivatives, so fused
    recurrent kernels can be used. Where a step crosses the kink of a ReLU or of a maximum, the gradient of the slope
    holds the kink's curvature, which the other forms do not see: it grows as 1 / STEP and outweighs the rest. Both
    sides draw the same dropout: from torch's generator, and from whatever `rewind` takes back.
    """
    length = torch.linalg.vector_norm(direction.detach())
    size = torch.linalg.vector_norm(u.detach()) / len(u) ** 0.5
    h = STEP * size / length.clamp(min=torch.finfo(u.dtype).tiny)
    generator = torch.cuda.default_generators[u.device.index or 0] if u.is_cuda else torch.default_generator
    drawn = generator.get_state()
    up = logits(u + h * direction)
    generator.set_state(drawn)
    rewind()
    down = logits(u - h * direction)
    own, other = ([cross_entropy(z, label) for z in (up, down)] for label in (y, partner_y))
    taylor = (own[0] - own[1]) / (2 * h) if length > 0 else torch.zeros_like(own[0])
    return (own[0] + own[1]) / 2, (other[0] + other[1]) / 2, taylor


def has_kinks(outputs: Tensor) -> bool:
    """Returns whether what autograd recorded on the way to the outputs has an operator whose derivative jumps."""
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if KINKED.match(node.name()):
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False


FORMS = {"forward": forward_mode, "double": double_backward, "central": central_difference}  # the cheapest first


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Runs recurrent layers as matrix products inside: the kernels that fuse them have one derivative only."""
    if not any(isinstance(part, nn.RNNBase) for part in model.modules()):
        yield
        return
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [backend.enabled for backend in backends]
    for backend in backends:
        backend.enabled = False
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.enabled = value


class Expanded(Mixed):
    """Mixup with all clients' examples, expanded around the shrunk input u = (1 - ratio) x (equation 2).

    L = (1 - ratio) CE(f(u), y) + ratio CE(f(u), pool_y) + scale T, with T the mean over the batch of the products of
    the loss's input gradients (own label) with pool_x.

    Args:
        ratio: lambda.
        scale: of T; 0 leaves it out.
        form: how T is found, one of FORMS.
    """

    is_pure = True
    parts = (OWN, PARTNER, TAYLOR)

    def can_be_mapped(self) -> bool:
        """Returns whether the slope is found without looking at numbers, which differences do."""
        return super().can_be_mapped() and self.form != "central"

    def __init__(self, ratio: float, scale: float, form: str):
        super().__init__(ratio)
        self.scale, self.form, self.passes = scale, form, 2 if scale else 1

    def mixed(self, model: nn.Module, batch: Tensors) -> tuple[Tensor, Tensors]:
        ratio, entrance = self.ratio, Entrance(model, batch["x"])
        if not self.scale:
            z = entrance.logits((1 - ratio) * entrance(batch["x"]))
            own, partner = cross_entropy(z, batch["y"]), cross_entropy(z, batch["partner_y"])
            parts = {OWN: own, PARTNER: partner, TAYLOR: torch.zeros_like(own)}
            return (1 - ratio) * own + ratio * partner, parts
        with nullcontext() if self.form == "central" else twice_differentiable(model):
            x, direction = entrance(batch["x"]), entrance(batch["partner_x"])
            form, labels = FORMS[self.form], (batch["y"], batch["partner_y"])
            if form is central_difference:
                form = partial(form, rewind=rewinding(model))
            own, partner, taylor = form(entrance.logits, (1 - ratio) * x, direction, *labels)
        loss = (1 - ratio) * own + ratio * partner + self.scale * taylor
        return loss, {OWN: own, PARTNER: partner, TAYLOR: taylor}


class FedMixTrainer(NaiveMixTrainer):
    """SGD on the expansion of Global Mixup around the shrunk input: all that is left of the partners are their means.

    Args:
        mix_ratio: lambda. The expansion needs it small: about half of what is good for NaiveMix.
        taylor_scale: "l1" takes scale = ratio (1 - ratio), as the expansion gives it and public code has it; "paper"
            takes ratio, as the equation is transcribed. They differ by ratio^2. "none" leaves T out, to see what it is
            worth: a step is then one pass.
        taylor_form: "forward" and "double" are equal ways to T of two passes each; "central" takes differences, also of
            two passes, which are no gradient of T where the network has kinks (ReLU, maxima). "auto" takes the first
            that the model supports, for recurrent networks central first, whose fused kernels have no second
            derivative; never central where there are kinks.
        naivemix: further arguments of NaiveMixTrainer.
    """

    def __init__(
        self,
        mix_ratio: Annotated[float, Interval(ge=0, lt=1)],
        taylor_scale: Literal["l1", "paper", "none"] = "l1",
        taylor_form: Literal["auto", "forward", "double", "central"] = "auto",
        **naivemix: Any,
    ):
        super().__init__(mix_ratio, **naivemix)
        self.scale = {"l1": mix_ratio * (1 - mix_ratio), "paper": mix_ratio, "none": 0.0}[taylor_scale]
        self.taylor_form = taylor_form
        self.minimise(Expanded(mix_ratio, self.scale, "double" if taylor_form == "auto" else taylor_form))

    def setup(self, workload: Workload, model: nn.Module, network: ModelCost) -> None:
        """Finds out which form the model supports, and prices it.

        Raises:
            ConfigError: if the model does not support the form that was asked for.
        """
        if self.scale:
            self.minimise(Expanded(self.mix_ratio, self.scale, self._supported_form(workload, model)))
        super().setup(workload, model, network)

    def _supported_form(self, workload: Workload, model: nn.Module) -> str:
        """Returns the form that was asked for, or the first of those that `auto` tries which works with the model."""
        reasons = {}
        for form in self._usual(workload, model) if self.taylor_form == "auto" else [self.taylor_form]:
            reason = self._reason_against(form, workload, model)
            if not reason:
                return form
            reasons[form] = reason
        what = f"trainer.taylor_form={self.taylor_form} does not work with {type(model).__name__}"
        advice = f"take another of auto, {', '.join(FORMS)}"
        if self.taylor_form == "auto":
            advice = "auto leaves out central, which is no gradient at the kinks of ReLUs and maxima: ask for it"
        raise ConfigError(f"{what}: {next(iter(reasons.values()))}; {advice}")

    def _usual(self, workload: Workload, model: nn.Module) -> list[str]:
        """Returns the forms that `auto` tries, in order."""
        sample = {n: t.to(next(model.parameters()).device) for n, t in workload.sample(2).items()}
        with torch.random.fork_rng(devices=[]):
            entrance = Entrance(_probe(model), sample["x"])
            kinks = has_kinks(entrance.logits(entrance(sample["x"])))
        if any(isinstance(part, nn.RNNBase) for part in model.modules()):
            return ["double"] if kinks else ["central"]
        return [form for form in FORMS if form != "central" or not kinks]

    def _reason_against(self, form: str, workload: Workload, model: nn.Module) -> str:
        """Returns why a form does not work with a model; empty where it does."""
        probe, device = _probe(model), next(model.parameters()).device
        sample = workload.sample(2)
        batch = {n: t.to(device) for n, t in (sample | self.sample_partner(workload, model, sample)).items()}
        with torch.random.fork_rng(devices=[]):
            try:
                loss = Expanded(self.mix_ratio, self.scale, form).mixed(probe, batch)[0]
                torch.autograd.grad(loss, [p for p in probe.parameters() if p.requires_grad], allow_unused=True)
            except (RuntimeError, NotImplementedError) as error:
                return one_line(error).partition(". ")[0]
        return ""


def _probe(model: nn.Module) -> nn.Module:
    """Returns a copy to try things out on, with dropout as clients will have it."""
    probe = deepcopy(model)
    seed_dropout(probe, 0)
    return probe
