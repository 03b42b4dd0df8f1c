"""Networks that lie inside one another: which blocks may go, limits that are FedAvg, and what devices are given."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import task_of
from torch import nn

from clients.worker import Worker
from devices.compression.nested import NestedNetworks, optional_blocks
from devices.errors import DeviceError, UserError
from devices.nas.tans.encoders import Retriever
from devices.nas.tans.probe import FUNCTIONAL
from fedsim.errors import ConfigError
from fedsim.exchanges.nested import FEATURES, QUERY, QUESTION
from fedsim.grid.edge import Enrolled
from fedsim.messages.records import tensors_of
from fedsim.messages.updates import ClientUpdate
from fedsim.meta.architectures import TOPOLOGY
from fedsim.meta.tans import QUERY as QUERY_SIZE
from fedsim.meta.tans import Tans, TansSettings
from fedsim.meta.tasks import TaskSettings
from fedsim.meta.zoo import Zoo, ZooTraining
from fedsim.models.resnet import ResNet
from fedsim.report.rounds import weights_sha256
from fedsim.runs import api
from fedsim.settings.groups import options
from strategies.architectures import Largest, OneSize, RandomFit
from strategies.nested import union

SMALL = ("method=nested", "model=resnet8", "model.width=8", "model.groups=2", "model.depth=14")
IMAGES = (*SMALL, "workload.input_shape=[1,12,12]", "trainer.batch_size=4")
MIXED = ("fleet=mixed", "num_clients=12", "cohort=6", "rounds=2")
GIVES = sorted(set(options("architecture")) - {"none", "query"})


@pytest.fixture(scope="module")
def nested() -> NestedNetworks:
    return NestedNetworks.find(ResNet((1, 8, 8), 3, depth=20, width=4, groups=2), torch.randn(2, 1, 8, 8))


# --- which blocks may go ----------------------------------------------------------------------------------------------


def test_blocks_that_add_to_what_passes_through_may_be_left_out(nested):
    """Three stages of three blocks; the first of the second and third changes the shape."""
    assert nested.stages == [["blocks.0", "blocks.1", "blocks.2"], ["blocks.4", "blocks.5"], ["blocks.7", "blocks.8"]]


class Gate(nn.Module):
    """Multiplies what passes through, so that with zero weights nothing is left."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


class Adds(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


def test_blocks_that_change_what_passes_through_stay():
    inner = nn.Sequential(Adds(nn.Conv2d(4, 4, 1)), Adds(nn.Conv2d(4, 4, 1)))
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), Gate(), Adds(nn.Conv2d(4, 4, 1)), nn.ReLU(), inner, nn.Flatten(), nn.Linear(16, 2)
    )
    assert optional_blocks(model, torch.randn(3, 1, 4, 4)) == [["2"], ["4.0", "4.1"]]


def test_a_block_that_runs_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Adds(nn.Linear(4, 4))])

        def forward(self, x):
            return self.blocks[0](self.blocks[0](x))

    assert optional_blocks(Twice(), torch.randn(2, 4)) == []


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("depth", [1.0, 0.5, 0.0])
def test_a_smaller_network_is_the_whole_one_with_zeros(nested, width, depth):
    """The whole network computes what the small one does, when it has the latter's tensors and zeros elsewhere."""
    whole = ResNet((1, 8, 8), 3, depth=20, width=4, groups=2)
    kept, x = nested.at(width, depth), torch.randn(2, 1, 8, 8)
    small = nested.build(whole, kept)
    assert set(small.state_dict()) == set(nested.slice(whole.state_dict(), kept))
    if width < 1 and 4 * width < 2:
        return
    state = whole.state_dict()
    scattered = nested.scatter(small.state_dict(), kept, state)[0]
    expected = small(x)
    whole.load_state_dict({name: scattered.get(name, torch.zeros_like(t)) for name, t in state.items()})
    assert torch.allclose(whole(x), expected, atol=1e-5)


def test_blocks_stay_from_the_front_of_each_stage_rounded_up(nested):
    assert nested.left_out(nested.at(1.0, 0.5)) == ["blocks.2", "blocks.5", "blocks.8"]
    assert nested.left_out(nested.at(1.0, 0.0)) == nested.blocks
    assert nested.left_out(nested.at(0.25, 1.0)) == []


def test_what_stays_travels_as_bits_and_comes_back(nested):
    bits = sum(group.channels for group in nested.groups.values()) + 7
    for width, depth in ((1.0, 1.0), (0.5, 0.0), (0.25, 0.5)):
        kept = nested.at(width, depth)
        packed = nested.pack(kept)
        assert len(packed) == -(-bits // 8)
        assert all(torch.equal(index, kept[name]) for name, index in nested.unpack(packed).items())


def test_no_channel_of_a_block_that_is_left_out_counts(nested):
    """Channels of the inner groups of the blocks that go, of all channels."""
    gone = sum(g.channels for n, g in nested.groups.items() if n.rpartition(".")[0] in nested.blocks)
    whole = sum(g.channels for g in nested.groups.values())
    assert nested.keep_ratio(nested.at(1.0, 0.0)) == pytest.approx((whole - gone) / whole)
    assert 0 < gone < whole


def test_a_block_is_whole_or_not_there(nested):
    kept = {**nested.all(), "blocks.1": torch.tensor([1])}
    with pytest.raises(DeviceError, match=re.escape("block 'blocks.1' must stay, [0], or go, [], got")):
        nested.pack(kept)
    with pytest.raises(DeviceError, match="a share of blocks must be in"):
        nested.at(1.0, 1.5)


def test_the_union_of_nested_networks_holds_each(nested):
    both = union([nested.at(1.0, 0.0), nested.at(0.5, 1.0)])
    assert all(torch.equal(both[name], index) for name, index in nested.all().items())


# --- averaging --------------------------------------------------------------------------------------------------------


def test_the_whole_network_everywhere_is_federated_averaging_bit_for_bit(federation):
    def trained(*overrides: str) -> str:
        made = federation(*overrides, *IMAGES[1:], "fleet=uniform")
        list(made.rounds())
        return weights_sha256(made.arrays)

    plain = trained("strategy=edge_mean")
    assert trained("method=nested", "architecture=none") == plain
    assert trained("method=nested", "architecture=largest", "architecture.round_s=1e6") == plain


def test_one_size_is_federated_averaging_of_the_small_network(federation):
    """Its test accuracy and its update are those of the small network, trained by everybody; the rest stays."""
    made = federation(*IMAGES, "architecture=one_size", "fleet=uniform", "strategy.widths=[0.5]", "strategy.depths=[0]")
    first = {name: t.clone() for name, t in tensors_of(made.arrays).items()}
    list(made.rounds())
    strategy = made.strategy
    member = strategy.family.members[0]
    groups = strategy.slices.groups
    shown, whole = tensors_of(strategy.judged(made.arrays)), tensors_of(made.arrays)
    indices = groups.indices(member.kept)
    for name, tensor in whole.items():
        if name not in groups.slice(whole, member.kept):
            assert torch.equal(tensor, first[name])
            assert not shown[name].any()
        elif name in indices:
            outside = torch.ones_like(tensor, dtype=torch.bool)
            outside &= ~groups.scatter(groups.slice(whole, member.kept), member.kept, whole)[1][name]
            assert torch.equal(tensor[outside], first[name][outside])
            assert not shown[name][outside].any()
    small = groups.build(strategy.slices.model, member.kept)
    small.load_state_dict(groups.slice(shown, member.kept))
    dense = strategy.slices.model
    dense.load_state_dict(shown)
    x = torch.randn(5, 1, 12, 12)
    assert torch.allclose(small(x), dense(x), atol=1e-5)


def test_a_block_is_averaged_over_those_who_have_it(federation):
    made = federation(*IMAGES, "fleet=uniform")
    strategy = made.strategy
    list(made.instructions(1))
    weights, groups = strategy.weights, strategy.slices.groups
    family = strategy.family
    deep = next(n for n, m in enumerate(family.members) if (m.width, m.depth) == (1.0, 1.0))
    flat = next(n for n, m in enumerate(family.members) if (m.width, m.depth) == (1.0, 0.0))
    updates = []
    for client, number, value, examples in ((0, deep, 1.0, 1), (1, flat, 5.0, 3)):
        kept = family.members[number].kept
        strategy.sent[client] = kept
        tensors = {name: torch.full_like(t, value) for name, t in groups.slice(weights, kept).items()}
        updates.append(ClientUpdate(client, examples, tensors))
    mean = strategy.combine(1, updates)
    block = groups.blocks[0]
    assert set(mean[f"{block}.conv1.weight"].flatten().tolist()) == {1.0}
    assert set(mean["stem.weight"].flatten().tolist()) == {4.0}  # (1 + 3 x 5) / 4


# --- which network a device gets --------------------------------------------------------------------------------------


class Steps:
    """A family of three networks that take 1, 2 and 4 seconds times the client's number + 1, and 10, 20, 40 bytes."""

    seed = 3
    members = ("a", "b", "c")

    def round_s(self, profile, steps):
        return np.array([1.0, 2.0, 4.0]) * profile.slow

    def member_s(self, number, profile, steps):
        return self.round_s(profile, steps)[number]

    def memory_bytes(self):
        return np.array([10.0, 20.0, 40.0])


def clients(*slow: float, memory: int = 100) -> list[Enrolled]:
    return [Enrolled(n, SimpleNamespace(slow=s, memory_bytes=memory, name=f"d{n}")) for n, s in enumerate(slow)]


def given(rule, everybody) -> list[int]:
    rule.begin(Steps(), everybody)
    return [rule.choose(client, None) for client in everybody]


def test_rules_by_hand():
    """Within 4 s: all of a device at 1, two networks at 2, one at 4."""
    everybody = clients(1, 2, 4)
    assert given(Largest(round_s=4), everybody) == [2, 1, 0]
    assert given(Largest(), everybody) == [2, 1, 0]  # as long as the smallest takes on the slowest: 4 s
    assert given(Largest(round_s=4, margin=0.01), everybody[:2]) == [1, 0]
    assert given(Largest(round_s=100), clients(1, 1, memory=25)) == [1, 1]
    assert given(OneSize(round_s=4), everybody) == [0, 0, 0]
    assert given(OneSize(round_s=8), everybody) == [1, 1, 1]
    drawn = given(RandomFit(round_s=4), clients(*[2] * 200))
    assert set(drawn) == {0, 1}
    assert 60 < sum(drawn) < 140


def test_no_network_that_fits_is_one_sentence():
    with pytest.raises(ConfigError, match=r"d0: none of 3 networks is within 0.5 s .* larger architecture.round_s"):
        given(Largest(round_s=0.5), clients(1))


@pytest.mark.parametrize("rule", GIVES)
def test_no_device_gets_more_than_fits(rule, federation):
    """By its own prediction, within the limit and the memory of the device, in every rule with limits."""
    made = federation(*IMAGES, *MIXED, f"architecture={rule}")
    list(made.rounds())
    strategy = made.strategy
    if not hasattr(strategy.architecture, "fitting"):
        return
    for client, number in strategy.given.items():
        enrolled = made.grid.client(client)
        assert strategy.family.round_s(enrolled.profile, 20)[number] <= strategy.architecture.most_s
        assert strategy.family.memory_bytes()[number] <= enrolled.profile.memory_bytes
    assert len(set(strategy.given.values())) > 1 or rule == "one_size"


def test_an_oracle_says_so(federation):
    made = federation(*IMAGES, *MIXED, "architecture=oracle", "evaluate_clients=4", "rounds=1")
    last = list(made.rounds())[-1][0]
    assert last.metrics["oracle"] == 1.0


def test_a_rule_needs_a_strategy_that_sends_different_networks(federation):
    with pytest.raises(ConfigError, match=r"architecture=random gives .* strategy=fedavg sends all the same; .*nested"):
        federation("architecture=random")


@pytest.mark.parametrize("method", ["nested", "heterofl", "fjord"])
def test_a_trainer_of_whole_networks_is_one_sentence(method, federation):
    with pytest.raises(ConfigError, match=r"SGDTrainer trains the whole network, and the strategy sends parts of it"):
        list(federation(*IMAGES[1:], *MIXED, f"method={method}", "trainer=sgd").rounds())


def test_another_run_starts_from_the_whole_network(federation):
    """Nothing of it is zero that was not zero before, whatever network is judged."""
    made = federation(*IMAGES, *MIXED)
    first = {name: t.clone() for name, t in tensors_of(made.arrays).items()}
    list(made.rounds())
    shown = tensors_of(made.strategy.judged(made.arrays))
    for name, tensor in tensors_of(made.arrays).items():
        assert not bool(((tensor == 0) & (first[name] != 0)).any())
    assert any(not t.any() and first[name].any() for name, t in shown.items())


def test_a_network_stays_a_clients_own_whatever_its_rule_would_say_later(federation):
    made = federation(*IMAGES, *MIXED)
    list(made.rounds())
    strategy, client = made.strategy, made.grid.client(0)
    before = strategy.choose(1, client)
    strategy.architecture.choose = lambda *_: 0 if len(before["blocks.0"]) else len(strategy.family.members) - 1
    assert strategy.choose(2, client) is not None
    assert all(torch.equal(index, before[name]) for name, index in strategy.choose(2, client).items())


def test_statistics_of_batch_norms_are_averaged_over_who_holds_them(federation):
    made = federation(
        "method=nested",
        "model=nb201",
        "model.norm=batch",
        "model.cells=2",
        *MIXED,
        "rounds=1",
        "workload.input_shape=[3,8,8]",
    )
    first = {name: t.clone() for name, t in tensors_of(made.arrays).items()}
    list(made.rounds())
    moved = [
        n for n, t in tensors_of(made.arrays).items() if n.endswith("running_var") and not torch.equal(t, first[n])
    ]
    assert moved


# --- what a client tells ----------------------------------------------------------------------------------------------


def test_a_client_tells_128_numbers_and_pays_for_them(federation):
    made = federation(*IMAGES)
    worker = Worker(made.world)
    content = min(made.instructions(1), key=lambda m: m.metadata.dst_node_id).content
    client = worker.context(task_of(content, 0, 1))
    told = worker.trainer.answer(client, QUESTION, None)
    assert told[QUERY][FEATURES].shape == (128,)
    assert client.log.work().flops > 0
    assert sum(t.numel() * t.element_size() for t in told[QUERY].values()) == 512


# --- what stays at home -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nested", "heterofl", "fjord"])
@pytest.mark.parametrize("private", ["head", "blocks.4.*"])
def test_private_tensors_stay_whole_and_at_home(method, private, federation):
    """Channels that a client's network lacks stay as they were, in blocks that it leaves out all of them."""
    own = IMAGES[1:] if method != "nested" else IMAGES
    made = federation(*own, *MIXED, f"method={method}", f"private=[{private}]", "evaluate_clients=12", "rounds=3")
    first = {name: t.clone() for name, t in tensors_of(made.arrays).items()}
    list(made.rounds())
    names = made.roles.private
    assert names
    assert all(torch.equal(tensors_of(made.arrays)[name], first[name]) for name in names)
    states = [
        {key.removeprefix("private."): t for key, t in state.items() if key.startswith("private.")}
        for state in made.grid.store.all().values()
    ]
    assert len(states) > 3
    for state in states:
        assert {name: t.shape for name, t in state.items()} == {name: first[name].shape for name in names}
    assert any(not torch.equal(state[name], first[name]) for state in states for name in names)


# --- by what a client tells -------------------------------------------------------------------------------------------


@pytest.fixture
def retriever(small_bundles: Path, tmp_path: Path) -> list[str]:
    """Settings of a query rule: a zoo of nets that were hardly trained, and encoders that nobody trained."""
    Zoo.begin(tmp_path / "zoo", TaskSettings(("toy", "grey"), 2, 1, 1), ZooTraining(3, 1)).make(lambda _: None)
    settings = TansSettings(width=8)
    scales = {
        f"{what}_{kind}": torch.full((size,), float(kind == "std"))
        for what, size in (("query", QUERY_SIZE), ("topology", TOPOLOGY), ("functional", FUNCTIONAL))
        for kind in ("mean", "std")
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Tans(Retriever(QUERY_SIZE, TOPOLOGY, FUNCTIONAL, settings.width), scales)
    made.save(tmp_path / "tans.safetensors", settings)
    weights, zoo = tmp_path / "tans.safetensors", tmp_path / "zoo"
    return ["architecture=query", f"architecture.weights={weights}", f"architecture.zoo={zoo}"]


def test_a_query_is_asked_once_and_gives_the_best_prediction_that_fits(federation, retriever):
    made = federation(*IMAGES, *MIXED, *retriever, "rounds=4", "evaluate_clients=3")
    reports = list(made.rounds())
    strategy = made.strategy
    rule = strategy.architecture
    assert set(strategy.given) <= set(strategy.told)
    asked = [r.client for _, rows in reports for r in rows if r.phase == f"query.{QUESTION}"]
    assert len(asked) == len(set(asked)) == len(strategy.told)
    for client, number in strategy.given.items():
        enrolled, scores = made.grid.client(client), rule.scores(strategy.told[client])
        fitting = rule.fitting(enrolled)
        assert number in fitting
        assert scores[number] == max(scores[n] for n in fitting)


def test_a_query_costs_its_bytes(federation, retriever):
    made = federation(*IMAGES, *MIXED, *retriever, "rounds=1")
    (_, _), (_, rows) = list(made.rounds())
    told = [r for r in rows if r.phase == f"query.{QUESTION}"]
    assert told
    assert {r.work.up_bytes for r in told} == {512}
    assert all(r.cost.total_s > 0 for r in told)


def test_what_is_no_retriever_is_one_sentence(federation, retriever, tmp_path):
    with pytest.raises(UserError, match=r"holds no zoo.json; make it with: fedsim devices make-zoo"):
        list(federation(*IMAGES, *retriever, f"architecture.zoo={tmp_path}").rounds())
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"no.safetensors"):
        list(federation(*IMAGES, *retriever, f"architecture.weights={tmp_path}/no.safetensors").rounds())


# --- what a person sees -----------------------------------------------------------------------------------------------


def test_a_run_says_which_device_trains_which_network(tmp_path):
    run = api.run(*SMALL, *MIXED, f"out={tmp_path}/run")
    given = run.summary["networks"]
    assert sum(sum(own.values()) for own in given.values()) == run.summary["clients"]["took_part"]
    assert {network for own in given.values() for network in own} <= {
        f"width {w}, depth {d}" for w in ("1", "0.5", "0.25") for d in ("1", "0.5", "0")
    }
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Which network each kind of device trains" in page
