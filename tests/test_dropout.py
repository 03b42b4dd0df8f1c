"""Dropout whose masks are a function of seed, layer and step, whoever trained before."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from conftest import Parted
from test_methods import NEEDS, TINY
from torch import nn

import clients.worker
from clients.app import serve
from clients.trainers.base import ClientContext
from clients.worker import Worker
from devices.cost import ModelCost
from fedsim.engines.base import Engine
from fedsim.engines.local import LocalEngine
from fedsim.exchanges.slices import Slices, model_cost
from fedsim.messages.cohort import ClientAnswer, ClientTask
from fedsim.models.dropout import SEEDED, dropout_layers, replace_dropout, rewinding, seed_dropout, words
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import World, build_world
from fedsim.settings.compose import compose
from fedsim.settings.groups import options

# Methods with networks of their own, or several passes in a step; the others are alike.
OWN_WAYS = ("fedavg", "fedmix", "finetune", "fjord", "ppp")
DROPPING = ["model=mlp", "model.hidden=[8]", "model.dropout=0.3"]


def world(*overrides: str) -> World:
    return build_world(json.dumps(compose([*TINY, *DROPPING, *overrides])))


def network(p: float = 0.4, seed: int = 7) -> nn.Sequential:
    """Two layers of dropout with a linear one between them, seeded."""
    made = nn.Sequential(nn.Dropout(p), nn.Linear(10, 10), nn.Dropout(p))
    replace_dropout(made)
    seed_dropout(made, seed)
    return made


def masks(layer: nn.Module, count: int = 1, shape: tuple[int, ...] = (50, 10)) -> list[torch.Tensor]:
    return [layer(torch.ones(shape)) for _ in range(count)]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_words_are_those_of_splitmix64():
    """The first numbers from the seed 1234567, as its public code has them; they are read without a sign."""
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [word % 2**64 for word in words(torch.tensor(1234567), 5).tolist()] == first


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_each_unit_is_kept_at_the_rate_and_the_mean_is_preserved(p: float):
    """Of n draws (1 - p) n are kept, within five standard deviations, over all and at every place of a word."""
    layer, n = network(p)[0], 400_000
    (out,) = masks(layer, shape=(n,))
    kept, deviation = out > 0, (p * (1 - p)) ** 0.5
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * deviation / n**0.5
    assert float(out.double().mean()) == pytest.approx(1, abs=5 * deviation / (1 - p) / n**0.5)
    for place in range(8):
        assert abs(float(kept[place::8].double().mean()) - (1 - p)) < 5 * deviation / (n / 8) ** 0.5
    both = (kept[1:] & kept[:-1]).double().mean()  # neighbours know nothing of each other
    assert abs(float(both) - (1 - p) ** 2) < 5 * ((1 - p) ** 2 * (1 - (1 - p) ** 2) / n) ** 0.5 * 3**0.5


def test_equal_seed_layer_and_step_give_equal_masks_and_others_do_not():
    first, again, other = network(), network(), network(seed=8)
    found = [*masks(first[0], 3), *masks(first[2], 3)]
    assert all(torch.equal(a, b) for a, b in zip(found, [*masks(again[0], 3), *masks(again[2], 3)], strict=True))
    every = [*found, *masks(other[0], 3)]
    for number, one in enumerate(every):
        for another in every[:number]:  # 500 units of which each agrees with probability .4^2 + .6^2 = .52
            assert abs(float((one == another).double().mean()) - 0.52) < 5 * (0.52 * 0.48 / 500) ** 0.5
    seed_dropout(first, 7)
    assert torch.equal(*masks(first[0]), found[0])


def test_a_shorter_batch_gets_the_first_rows_of_the_mask_of_a_longer_one():
    (longer,), (shorter,) = masks(network()[0], shape=(20, 9)), masks(network()[0], shape=(13, 9))
    assert torch.equal(longer[:13], shorter)


def test_a_mask_goes_by_places_and_not_by_memory_format():
    x = torch.rand(4, 3, 5, 6) + 1
    last = network()[0](x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last, network()[0](x))
    assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", list(SEEDED), ids=lambda kind: kind.__name__)
def test_every_kind_drops_what_torchs_own_does(kind: type[nn.Module], inplace: bool):
    """The same units stand and fall together, for the same values."""
    layer = kind(0.5, inplace=inplace)
    made, x = nn.ModuleDict({"drop": layer, "other": nn.Linear(1, 1)}), torch.ones(6, 40, 3, 3)
    if kind is nn.Dropout1d:
        x = x[..., 0]
    if kind is nn.Dropout3d:
        x = x[..., None]
    theirs = layer(x.clone())
    replace_dropout(made)
    seed_dropout(made, 1)
    assert layer is made["drop"]
    assert isinstance(layer, kind)
    given = x.clone()
    ours = layer(given)
    assert (ours is given) == inplace
    assert torch.allclose(ours.unique(), theirs.unique(), atol=1e-4)
    in_one = [bool((out.flatten(2) == out.flatten(2)[..., :1]).all()) for out in (ours, theirs)]
    assert in_one[0] == in_one[1] == (kind not in (nn.Dropout, nn.AlphaDropout))


def test_a_gradient_is_the_mask_over_what_is_kept():
    layer, x = network(0.25)[0], torch.randn(30, 10, requires_grad=True)
    (mask,) = masks(network(0.25)[0], shape=(30, 10))
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(gradient, mask)
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.75])


def test_evaluation_changes_nothing_and_is_no_step():
    model, x = network(), torch.randn(5, 10)
    first = masks(model[0], 2)
    seed_dropout(model, 7)
    model.eval()
    assert model[0](x) is x
    assert all(torch.equal(a, b) for a, b in zip(masks(model.train()[0], 2), first, strict=True))


def test_rewinding_repeats_the_steps_since():
    model = network()
    masks(model[0], 2)
    rewind = rewinding(model)
    first = masks(model[0], 2)
    rewind()
    assert all(torch.equal(a, b) for a, b in zip(masks(model[0], 2), first, strict=True))


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_built_model_has_seeded_layers_and_the_names_it_had():
    model = world("model.dropout=0.3").workload.build_model()
    assert list(dropout_layers(model)) == ["body.3"]
    plain = world("model.dropout=0.0").workload.build_model()
    assert not list(model.buffers())
    assert sorted(t.shape for t in model.state_dict().values()) == sorted(t.shape for t in plain.state_dict().values())
    seed_dropout(model, 3)
    assert not list(model.buffers())
    assert list(model.state_dict()) == list(world().workload.build_model().state_dict())


def test_copies_and_narrowed_networks_keep_the_layers_and_go_on_from_there():
    workload = world().workload
    slices = Slices(workload)
    narrow = slices.network(slices.groups.first(0.5)).train()
    assert list(dropout_layers(narrow)) == list(dropout_layers(slices.model))
    seed_dropout(slices.model, 5)
    others = deepcopy(slices.model), slices.groups.build(slices.model, slices.groups.first(0.5))
    own, copied, cut = (next(iter(dropout_layers(net.train()).values())) for net in (slices.model, *others))
    (expected,) = masks(own)
    assert torch.equal(*masks(copied), expected)
    assert torch.equal(*masks(cut), expected)


def test_a_seeded_model_costs_what_it_did_before():
    workload = world().workload
    model = workload.build_model()

    def cost() -> ModelCost:
        return model_cost(workload, model, "net")

    before = cost()
    seed_dropout(model, 3)
    assert cost() == before
    assert all(layer.state is not None for layer in dropout_layers(model).values())


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_model_is_exported_as_it_was():
    model, x = network().eval(), torch.randn(4, 10)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


# --- a federation ----------------------------------------------------------------------------------------------------


def weights_of(engine: Engine, *overrides: str) -> str:
    run = Federation(world("rounds=1", "cohort=3", *overrides), engine)
    list(run.rounds())
    return weights_sha256(run.arrays)


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=[] if m in OWN_WAYS else [pytest.mark.slow]) for m in options("method")],
)
def test_no_method_draws_dropout_from_anything_but_the_clients_seed(method: str, monkeypatch: pytest.MonkeyPatch):
    """Torch's generator stands after a client where its seed put it, and who came before changes nothing."""
    moved: list[str] = []
    seeds: list[int] = []
    answer, seed_torch = Worker.answer, clients.worker.seed_torch

    def noted(device: torch.device, seed: int) -> None:
        seeds.append(seed)
        seed_torch(device, seed)

    def watched(worker: Worker, phase: str, client: ClientContext, task: ClientTask) -> ClientAnswer:
        found = answer(worker, phase, client, task)
        state = torch.get_rng_state()
        torch.manual_seed(seeds[-1])
        if not torch.equal(state, torch.get_rng_state()):
            moved.append(f"{phase} of client {client.client_id}")
        return found

    monkeypatch.setattr("clients.worker.seed_torch", noted)
    monkeypatch.setattr(Worker, "answer", watched)
    given = [f"method={method}", *NEEDS.get(f"method={method}", []), "evaluate_clients=2"]
    given += ["strategy.num_malicious_nodes=0"] if method == "multikrum" else []  # of three clients
    ordered = weights_of(LocalEngine(serve), *given)
    assert seeds
    assert not moved
    assert weights_of(Parted(2), *given) == ordered
