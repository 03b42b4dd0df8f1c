"""Private tensors and the personal methods: limit cases, what travels, and what is paid for."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import answered, sent_to, task_of
from flwr.app import RecordDict
from torch import nn
from torchs_counter import counter

from clients.app import serve
from clients.state import ClientState
from clients.trainers.sgd import SGDRun, SGDTrainer
from clients.worker import Worker
from devices.latency.models import StructuredLatency
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.messages.cohort import CohortAnswer, CohortTask
from fedsim.messages.records import ARRAYS, STATE, record_of, tensors_of
from fedsim.messages.weights import JOINED, bytes_of
from fedsim.models.mlp import MLP
from fedsim.models.roles import private_names
from fedsim.report.rounds import weights_sha256
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.compose import compose
from fedsim.settings.names import method_name
from fedsim.settings.run_settings import RunSettings
from fedsim.workloads.base import ClientData, Examples
from fedsim.workloads.blobs import Blobs

PERSONAL = ["fedrep", "lg_fedavg", "fedbn", "ditto", "fedavg_ft"]
TINY = [
    "workload=blobs",
    "workload.num_classes=3",
    "workload.input_shape=[6]",
    "workload.examples_per_client=15",
    "workload.test_examples=20",
    "model=mlp",
    "model.hidden=[5]",
    "model.norm=layer",
    "fleet=uniform",
    "num_clients=6",
    "cohort=4",
    "rounds=3",
    "trainer.batch_size=4",
    "engine.device=cpu",
]


class Listener(LocalEngine):
    """The engine in this process; keeps every client's task and answer."""

    def __init__(self):
        super().__init__(serve)
        self.tasks, self.answers = [], []

    def run(self, task: CohortTask) -> Iterator[CohortAnswer]:
        self.tasks += task.clients
        for answer in super().run(task):
            self.answers.append(answer)
            yield answer


def federate(*overrides: str, engine: LocalEngine | None = None) -> Federation:
    """A finished run."""
    federation = Federation(build_world(json.dumps(compose([*TINY, *overrides]))), engine or LocalEngine(serve))
    federation.clients = [client for _, clients in federation.rounds() for client in clients]
    return federation


def state_of(federation: Federation, client: int) -> dict[str, torch.Tensor]:
    return federation.grid.store.get(client)


def of(group: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{group}."): t for name, t in state.items() if name.startswith(f"{group}.")}


def alone(*overrides: str, state: ClientState | None = None):
    """A worker, and its client 0 in round 1 of these settings with the initial weights as the broadcast."""
    federation = Federation(build_world(json.dumps(compose([*TINY, *overrides]))), LocalEngine(serve))
    message = min(federation.instructions(1), key=lambda m: m.metadata.dst_node_id)
    part = message.content if state is None else RecordDict({**message.content, STATE: record_of(state)})
    worker = Worker(federation.world)
    return worker, worker.context(task_of(part, message.metadata.dst_node_id, 1)), part


# --- roles -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.middle = nn.Linear(4, 4)
        self.group = nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 4)
        if tied:
            self.out.weight = self.middle.weight


def test_roles_name_the_tensors_of_a_model():
    every = set(Net().state_dict())
    statistics = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}
    assert private_names(Net(), ["head"]) == {"out.weight", "out.bias"}
    assert private_names(Net(), ["body"]) == every - {"out.weight", "out.bias"}
    assert private_names(Net(), ["first"]) == {"stem.weight", "stem.bias"}
    assert private_names(Net(), ["norm"]) == {"bn.weight", "bn.bias", *statistics, "group.weight", "group.bias"}
    assert private_names(Net(), ["*.running_*", "*tracked"]) == statistics
    assert private_names(Net(), ["first", "out.bias"]) == {"stem.weight", "stem.bias", "out.bias"}
    assert private_names(Net(), []) == set()


@pytest.mark.parametrize(
    "model, private, said",
    [
        (MLP([6], 3), ["norm"], "private holds 'norm', but model MLP has no normalisation layers with weights"),
        (MLP([6], 3, []), ["body"], "private holds 'body', but model MLP has no layer before a last linear one"),
        (MLP([6], 3), ["haed"], "unknown role or pattern .*'haed'; did you mean 'head'"),
        (MLP([6], 3), ["head.wieght"], "did you mean 'head.weight'"),
        (MLP([6], 3), ["head", "body"], "leaves no tensor of model MLP to share"),
        (Net(tied=True), ["head"], "out.weight and middle.weight of model Net are one tensor"),
    ],
)
def test_a_wrong_role_is_refused_in_one_sentence(model, private, said):
    with pytest.raises(ConfigError, match=said):
        private_names(model, private)


@pytest.mark.parametrize("value", ["head", "[1]", '[""]'])
def test_private_is_a_list_of_names(value):
    with pytest.raises(ConfigError, match="private must be a list of roles or patterns"):
        compose([*TINY, f"private={value}"])


def test_training_alone_is_no_federation():
    with pytest.raises(ConfigError, match="leaves no trained tensor of model MLP to share; keep some out"):
        alone("method=fedrep", "private=['*.weight','*.bias']", "model.norm=batch")


def test_a_run_is_named_after_what_is_private():
    names = {
        "method=fedrep": "fedrep",
        "method=fedrep private=[first]": "fedrep private=[first]",
        "method=fedbn strategy=fedadam": "fedbn strategy=fedadam",
        "method=fedavg private=[head,first]": "fedavg private=[head,first]",
        "private=[head]": "fedavg private=[head]",
    }
    assert {text: method_name(RunSettings.of(compose([*TINY, *text.split()]))) for text in names} == names


# --- limit cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PERSONAL)
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "edge_mean"])
def test_with_all_tensors_shared_every_method_is_fedavg(method, strategy):
    same = [f"strategy={strategy}", "private=[]", "trainer.local_epochs=2", "evaluate_clients=2"]
    plain, personal = federate("method=fedavg", *same), federate(f"method={method}", *same)
    assert weights_sha256(personal.arrays) == weights_sha256(plain.arrays)
    assert [c.client for c in personal.clients] == [c.client for c in plain.clients]


def test_the_head_phase_leaves_the_body_alone_and_the_body_phase_the_head(monkeypatch):
    worker, client, part = alone("method=fedrep", "trainer.head_epochs=2")
    before = {name: t.clone() for name, t in worker.live.weights.items()}
    trainer, task, seen = worker.trainer, sent_to(worker, client, part), []
    train = SGDRun.train

    def watch(run, batches):
        loss = train(run, batches)
        seen.append({name: t.clone() for name, t in worker.live.weights.items()})
        return loss

    monkeypatch.setattr(SGDRun, "train", watch)
    trainer.fit(client, task)
    after_head, after_body = seen
    for name in before:
        private = name.startswith("head.")
        assert torch.equal(after_head[name], before[name]) != private, name
        assert torch.equal(after_body[name], after_head[name]) == private, name
    assert all(p.requires_grad for p in worker.model.parameters())


def test_the_head_phase_is_sgd_on_the_head():
    """By hand: full gradients of the whole model, of which only the head's are applied."""
    worker, client, part = alone("method=fedrep", "trainer.head_epochs=2", "trainer.local_steps=1", "trainer.lr=0.3")
    model = client.workload.build_model()
    plain = SGDTrainer(lr=0.3, batch_size=4)
    for batch in plain.shuffled(client, "head-batches", 2):
        model.zero_grad()
        client.workload.loss(model, batch).backward()
        with torch.no_grad():
            for p in model.head.parameters():
                p -= 0.3 * p.grad
    answered(worker, client, part, "train")
    assert torch.allclose(client.state["private.head.weight"], model.head.weight, atol=1e-6)


def personal_by_hand(pull: float, lr: float = 0.2):
    """Client 0's personal model after round 1, from plain autograd."""
    worker, client, part = alone(
        "method=ditto", f"trainer.pull={pull}", f"trainer.lr={lr}", "trainer.personal_epochs=3"
    )
    received = {name: t + 0.5 for name, t in tensors_of(part[ARRAYS]).items()}
    part[ARRAYS] = record_of(received)
    model = client.workload.build_model()
    for batch in SGDTrainer(lr=lr, batch_size=4).shuffled(client, "personal-batches", 3):
        model.zero_grad()
        client.workload.loss(model, batch).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lr * (p.grad + pull * (p - received[name]))
    answered(worker, client, part, "train")
    return of("personal", client.state), dict(model.named_parameters()), received


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_a_personal_model_follows_its_loss_and_the_pull(pull):
    personal, by_hand, _ = personal_by_hand(pull)
    assert personal.keys() == by_hand.keys()
    for name, t in personal.items():
        assert torch.allclose(t, by_hand[name], atol=1e-5), name


def test_a_strong_pull_ends_at_the_received_weights():
    weak, _, received = personal_by_hand(0.1, lr=0.001)
    strong, _, _ = personal_by_hand(500.0, lr=0.001)
    far = sum(float((weak[n] - received[n]).square().sum()) for n in received) ** 0.5
    near = sum(float((strong[n] - received[n]).square().sum()) for n in received) ** 0.5
    # The stationary point is gradient / pull away; a loss of three classes on these inputs has gradients of order 1.
    assert near < 0.02 < 1 < far


def test_without_pull_a_personal_model_does_not_see_the_federation():
    """Another server makes other global weights, and leaves the personal models as they are."""
    one = federate("method=ditto", "trainer.pull=0")
    other = federate("method=ditto", "trainer.pull=0", "strategy=fedadam")
    assert weights_sha256(one.arrays) != weights_sha256(other.arrays)
    for client in range(6):
        mine, theirs = state_of(one, client), state_of(other, client)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- what travels, and what stays ------------------------------------------------------------------------------------

SHARED = {
    "fedrep": {"body.1.weight", "body.1.bias", "body.2.weight", "body.2.bias"},
    "lg_fedavg": {"head.weight", "head.bias"},
    "fedbn": {"body.1.weight", "body.1.bias", "head.weight", "head.bias"},
    "ditto": set(MLP([6], 3, [5], "layer").state_dict()),
    "fedavg_ft": set(MLP([6], 3, [5], "layer").state_dict()),
}


@pytest.mark.parametrize("method", PERSONAL)
@pytest.mark.parametrize("strategy", ["fedavg", "edge_mean"])
def test_only_shared_tensors_are_in_any_message(method, strategy):
    engine = Listener()
    federation = federate(f"method={method}", f"strategy={strategy}", "evaluate_clients=6", engine=engine)
    sizes = {name: t.numel() for name, t in MLP([6], 3, [5], "layer").state_dict().items()}
    shared_bytes = 4 * sum(sizes[name] for name in SHARED[method])
    assert set(federation.shared) == SHARED[method]
    for client in federation.clients:
        assert client.work.down_bytes == shared_bytes
        assert client.work.up_bytes == (shared_bytes if client.phase == "train" else 0)
    # In what travels itself: weights of the shared size or whole sums of it, and what is named a client's state.
    answers = [one for answer in engine.answers for one in answer.clients]
    for state in [one.state for one in [*engine.tasks, *answers]]:
        assert all(key.split(".")[0] in ("private", "personal") for key in state)
    sent = [one.weights for one in answers] + [block.total for answer in engine.answers for block in answer.sums]
    for tensors in [task.broadcast.weights for task in engine.tasks] + [w.tensors for w in sent if w is not None]:
        assert bytes_of(tensors) in (shared_bytes, 2 * shared_bytes)  # float32, or a sum in float64
        assert set(tensors) <= SHARED[method] | {JOINED}
    assert not any(one.extras for one in answers)


@pytest.mark.parametrize("method", ["fedrep", "lg_fedavg", "fedbn"])
def test_private_tensors_live_on_the_devices(method):
    federation = federate(f"method={method}")
    initial = {name: t.clone() for name, t in federation.world.workload.build_model().state_dict().items()}
    served = tensors_of(federation.arrays)
    trained = {c.client for c in federation.clients if c.phase == "train"}
    assert len(trained) > 0
    for name in initial:
        assert torch.equal(served[name], initial[name]) == (name not in SHARED[method]), name
    for client in range(6):
        kept = of("private", state_of(federation, client))
        assert set(kept) == (set(initial) - SHARED[method] if client in trained else set())
        for name, t in kept.items():
            assert not torch.equal(t, initial[name]), name
    stored = {c.work.storage_bytes for c in federation.clients}
    assert stored == {4 * sum(t.numel() for name, t in initial.items() if name not in SHARED[method])}


def test_statistics_of_batch_norm_stay_too():
    federation = federate("method=fedbn", "model.norm=batch", "trainer.batch_size=20")
    assert not [name for name in federation.shared if name.startswith("body.2.")]
    client = next(c.client for c in federation.clients if c.phase == "train")
    kept = of("private", state_of(federation, client))
    assert {"body.2.running_mean", "body.2.running_var", "body.2.num_batches_tracked"} <= set(kept)
    assert int(kept["body.2.num_batches_tracked"]) > 0


def test_a_client_goes_on_with_its_own_tensors_and_is_judged_with_them():
    """A head that says class 2 whatever comes: client 0 is judged by it, a newcomer by the initial one."""
    head = {"private.head.weight": torch.zeros(3, 5), "private.head.bias": torch.tensor([0.0, 0.0, 9.0])}
    worker, client, part = alone("method=fedrep", "trainer.head_epochs=0", state=ClientState(head))
    answer = answered(worker, client, part, "evaluate")
    wanted = float((client.data.test.labels == 2).float().mean())
    assert answer["metrics"]["accuracy"] == pytest.approx(wanted)
    answered(worker, client, part, "train")  # no epoch for the head: it stays, frozen
    assert torch.equal(client.state["private.head.bias"], head["private.head.bias"])
    assert torch.equal(worker.live.weights["head.bias"], head["private.head.bias"])
    newcomer = worker.context(task_of(RecordDict({ARRAYS: part[ARRAYS]}), client.client_id, 1))
    answered(worker, newcomer, RecordDict({k: v for k, v in part.items() if k != STATE}), "evaluate")
    initial = client.workload.build_model().state_dict()
    assert all(torch.equal(t, initial[name]) for name, t in worker.live.weights.items())


@pytest.mark.parametrize("method, group", [("fedrep", "private"), ("ditto", "personal"), ("lg_fedavg", "private")])
def test_a_slow_phone_personalises_under_a_deadline(method: str, group: str):
    """Nobody is in time: the global weights stay, and what is private goes on from round to round as it would alone."""
    settings = (f"method={method}", "cohort=6", "trainer.lr=0.2", "trainer.local_epochs=1")
    late = federate(*settings, "deadline_s=1e-9", "rounds=2")
    assert {c.outcome for c in late.clients} == {"late"}
    assert sorted(late.grid.store.all()) == list(range(6))
    message = late.instructions(1)[0]  # the weights of round 0 still
    worker, number = Worker(late.world), message.metadata.dst_node_id
    state = ClientState()
    for round in (1, 2):
        part = RecordDict({**message.content, **({STATE: record_of(state)} if state else {})})
        client = worker.context(task_of(part, number, round))
        answered(worker, client, part, "train")
        state = client.state
    kept, by_hand = of(group, state_of(late, number)), of(group, state)
    assert kept.keys() == by_hand.keys() != set()
    assert all(torch.equal(t, by_hand[name]) for name, t in kept.items())


def test_private_tensors_that_are_no_numbers_fail_their_client():
    with pytest.raises(Exception, match=r"client \d+ .*NaN"):
        federate("method=fedrep", "trainer.lr=1e30", "trainer.local_epochs=5")


def test_proximal_terms_reach_private_tensors_too():
    """FedProx beside a private head: the head is held to where the client began the round."""
    federation = federate("method=fedprox", "private=[head]", "trainer.proximal_mu=5.0")
    free = federate("method=fedavg", "private=[head]", "trainer.lr=0.1")
    client = next(c.client for c in federation.clients)
    initial = federation.world.workload.build_model().state_dict()["head.weight"]
    moved = [float((state_of(f, client)["private.head.weight"] - initial).norm()) for f in (federation, free)]
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize("method", ["lg_fedavg"])
def test_clients_trained_at_once_keep_their_own_tensors(method):
    alone = federate(f"method={method}", "trainer.batch_size=5")
    together = federate(f"method={method}", "trainer.batch_size=5", "engine.batch_clients=3")
    for client in range(6):
        mine, theirs = state_of(alone, client), state_of(together, client)
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[name], theirs[name], atol=1e-5) for name in mine)
    for name, t in tensors_of(alone.arrays).items():
        assert torch.allclose(t, tensors_of(together.arrays)[name], atol=1e-5)


# --- what is paid for ------------------------------------------------------------------------------------------------


def test_frozen_layers_need_no_weight_gradients():
    """Two linear layers, 6 to 5 to 3: a weight gradient and an input gradient each cost as much as the forward pass."""
    worker, client, part = alone("method=fedrep", "trainer.head_epochs=5", "trainer.local_epochs=1")
    first, last, n = 2 * 6 * 5, 2 * 5 * 3, len(client.data.train)
    answered(worker, client, part, "train")
    by_phase = {p.network.name: 0.0 for p in client.log.work().passes}
    for p in client.log.work().passes:
        by_phase[p.network.name] += p.flops
    head_phase = 5 * n * (first + last + last)  # no gradient flows below the head
    body_phase = n * (first + last + first + last)  # through the head into the body's weights
    assert by_phase == {"dense, private part": head_phase, "dense, shared part": body_phase}


def test_a_pass_with_frozen_layers_costs_its_share_on_a_measured_device():
    settings = [*TINY, "method=fedrep", "fleet=phones", "latency=structured"]
    world = build_world(json.dumps(compose(settings)))
    worker = Worker(world)
    network, device = worker.trainer.phase_costs[True], world.fleet[0]
    whole = replace(network, backward_share=1.0)

    def seconds(price, backwards):
        from devices.cost import Passes, Work

        return StructuredLatency().compute_s(Work((Passes(price, 4, 1, backwards),)), device)

    forward = seconds(whole, 0)
    assert 0 < network.backward_share < 1
    backward = seconds(whole, 1) - forward
    assert seconds(network, 1) - forward == pytest.approx(network.backward_share * backward)


@pytest.mark.parametrize("method", ["ditto", "fedavg_ft"])
def test_judging_and_personal_epochs_are_paid_for(method):
    worker, client, part = alone(f"method={method}")
    with counter() as counted:
        answered(worker, client, part, "evaluate")
    assert client.log.work().flops == pytest.approx(counted.get_total_flops(), rel=0.01)
    dense = worker.network
    judged = len(client.data.test) * dense.forward_flops
    step = len(client.data.train) * (dense.forward_flops + dense.backward_flops)
    assert client.log.work().flops == pytest.approx(judged + (5 * step if method == "fedavg_ft" else 0))
    again = worker.context(task_of(part, client.client_id, 1))
    answered(worker, again, part, "train")
    assert again.log.work().flops == pytest.approx((10 if method == "ditto" else 5) * step)


def test_fine_tuning_is_not_kept():
    tuned, plain = (federate(f"method={m}", "evaluate_clients=6") for m in ("fedavg_ft", "fedavg"))
    assert len(tuned.grid.store) == 0
    judged = [{c.client: c.metrics["loss"] for c in f.clients if c.phase == "evaluate"} for f in (tuned, plain)]
    assert judged[0].keys() == judged[1].keys()
    assert judged[0] != judged[1]


def test_tuning_alone_leaves_the_weights_as_they_came():
    still, tuned = (federate("trainer=tune_only", "evaluate_clients=6", f"trainer.tune_epochs={n}") for n in (0, 3))
    first = still.world.workload.build_model().state_dict()
    for federation in (still, tuned):
        after = tensors_of(federation.arrays)
        assert all(torch.equal(after[name], tensor) for name, tensor in first.items())
    judged = [{c.client: c.metrics["loss"] for c in f.clients if c.phase == "evaluate"} for f in (still, tuned)]
    assert sum(judged[1].values()) < sum(judged[0].values())
    work = [sum(c.work.flops for c in f.clients if c.phase == "train") for f in (still, tuned)]
    assert work == [0, 0]


@pytest.mark.parametrize(
    "override, said",
    [
        ("method=fedrep trainer.head_epochs=-1", "trainer.head_epochs must be at least 0, got -1"),
        ("method=ditto trainer.pull=-1", "trainer.pull must be at least 0, got -1"),
        ("method=ditto trainer.personal_epochs=0", "trainer.personal_epochs must be at least 1, got 0"),
        ("method=fedavg_ft trainer.tune_epochs=-1", "trainer.tune_epochs must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(override, said):
    with pytest.raises(ConfigError, match=said):
        build_world(json.dumps(compose([*TINY, *override.split()])))


# --- what they are for -----------------------------------------------------------------------------------------------


def contradict(client_data, workload: Blobs, client_id: int) -> ClientData:
    """Clients 2k and 2k + 1 have the same examples; the odd one calls every class by the next one's name."""
    data = client_data(workload, client_id // 2)
    return ClientData(
        *(Examples({"x": p.tensors["x"], "y": (p.labels + client_id % 2) % 3}) for p in (data.train, data.test))
    )


@pytest.mark.parametrize("method", ["fedavg", "fedrep", "lg_fedavg", "ditto", "fedavg_ft"])
def test_where_clients_contradict_each_other_only_a_personal_model_can_be_right(method, monkeypatch):
    """Whatever one model says of an example, it is right for one of two clients at most: 1/2 is its exact bound."""
    client_data = Blobs.client_data
    monkeypatch.setattr(Blobs, "client_data", lambda self, client_id: contradict(client_data, self, client_id))
    size = ["workload.examples_per_client=60", "workload.client_test_fraction=0.3", "rounds=8", "cohort=6"]
    federation = federate(f"method={method}", *size, "evaluate_every=8", "evaluate_clients=6", "trainer.local_epochs=3")
    judged = [c.metrics["accuracy"] for c in federation.clients if c.phase == "evaluate"]
    assert len(judged) == 6
    assert (sum(judged) / 6 > 0.5) == (method != "fedavg")
