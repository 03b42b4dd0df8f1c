"""Which clients take part: each rule against a small fleet or numbers worked out by hand."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import every_way, rounds_in
from cut_short import comparable
from flwr.app import Message, RecordDict
from told_clients import NETWORK, WEIGHTS, edge

from clients.app import serve
from fedsim.engines.local import LocalEngine
from fedsim.errors import ConfigError
from fedsim.grid.participants import Participants, Roster, Seen
from fedsim.messages.records import ArrayRecord
from fedsim.report.files import read_all_rows
from fedsim.runs import api
from fedsim.runs.federation import Federation
from fedsim.settings.build import build_world
from fedsim.settings.groups import options
from strategies.participants import BySize, Fastest, LeastOften, Oort, PowerOfChoice, Tifl, drawn

OFFERING = sorted(set(options("participants")) - {"uniform"})
MIXED = ("fleet=phones", "rounds=3", "num_clients=12", "cohort=3", "partition=quantity")


class Known:
    """A roster of clients of whom all is known; clients with an odd id are slow."""

    deadline_s = None

    def __init__(self, **seen: Seen):
        self.seen = {int(name[1:]): one for name, one in seen.items()}
        self.asked: list[tuple[list[int], bool]] = []

    def of(self, client: int) -> Seen:
        return self.seen.get(client, Seen())

    def expected_s(self, client: int) -> float:
        return self.of(client).seconds or (10.0 if client % 2 else 1.0)

    def ask(self, clients, weights=None) -> None:
        self.asked.append((list(clients), weights is not None))
        for client in clients:
            self.seen.setdefault(client, Seen()).examples = 5
            self.seen[client].loss = float(client)


def choose(rule: Participants, roster: Known, free, count: int, number: int = 1, seed: int = 0) -> list[int]:
    rule.roster = roster  # type: ignore[assignment]
    return sorted(rule.choose(number, count, list(free), ArrayRecord(), np.random.default_rng(seed)))


def test_sizes_are_asked_once_and_decide_the_chances():
    roster = Known(c0=Seen(examples=1000), c1=Seen(examples=1000), c2=Seen(examples=1))
    chosen = [choose(BySize(), roster, range(3), 2, seed=seed) for seed in range(200)]
    assert chosen.count([0, 1]) > 190
    assert choose(BySize(), roster, range(5), 2)
    assert roster.asked == [([3, 4], False)]


def test_power_of_choice_takes_the_highest_losses_of_its_candidates():
    """All four are candidates; their losses are their ids."""
    roster = Known()
    assert choose(PowerOfChoice(2.0), roster, range(4), 2) == [2, 3]
    assert roster.asked == [([0, 1, 2, 3], False), ([0, 1, 2, 3], True)]


def test_least_often_means_that_everybody_takes_part():
    roster, rule, counts = Known(), LeastOften(), dict.fromkeys(range(7), 0)
    for number in range(14):
        for client in choose(rule, roster, range(7), 3, seed=number):
            counts[client] += 1
            roster.seen.setdefault(client, Seen()).asked += 1
    assert set(counts.values()) == {6}


def test_fastest_leaves_out_who_would_be_late():
    assert choose(Fastest(limit_s=5.0, candidates=100), Known(), range(8), 6) == [0, 2, 4, 6]
    assert choose(Fastest(candidates=100), Known(c1=Seen(seconds=0.5)), range(8), 2) == [0, 1]


def test_tiers_hold_clients_of_equal_speed():
    chosen = {tuple(choose(Tifl(tiers=2), Known(), range(8), 3, seed=seed)) for seed in range(40)}
    assert all(len({client % 2 for client in some}) == 1 for some in chosen)
    assert {some[0] % 2 for some in chosen} == {0, 1}
    fast = {tuple(choose(Tifl(tiers=2, chances=[1, 0]), Known(), range(8), 3, seed=seed)) for seed in range(20)}
    assert {client % 2 for some in fast for client in some} == {0}
    assert len(choose(Tifl(tiers=4), Known(), range(8), 5)) == 5  # more than a tier has


def test_oort_scores_utility_age_and_speed():
    """Utilities 10 and 30 are scaled to 0.01 / 20.01 and 1; client 3 takes four times the 1 s that are fast enough."""
    seen = {"c1": Seen(1, 10, 1.0, 1.0, 4), "c3": Seen(1, 30, 1.0, 4.0, 2)}
    rule = Oort(penalty=2.0, clip=1.0)
    rule.roster = Known(**seen)  # type: ignore[assignment]
    scores = rule.scores(9, [1, 3], limit_s=1.0)
    assert scores[1] == pytest.approx(0.01 / 20.01 + (0.1 * np.log(9) / 4) ** 0.5)
    assert scores[3] == pytest.approx((1 + (0.1 * np.log(9) / 2) ** 0.5) / 16)


def test_oort_explores_fast_clients_first_and_then_exploits_useful_ones():
    useful = {f"c{client}": Seen(1, 10, 5.0 if client < 3 else 0.1, 1.0, 1) for client in range(20)}
    assert {client % 2 for client in choose(Oort(exploration=1, window=1), Known(), range(20), 5)} == {0}
    exploiting = Oort(exploration=0, exploration_min=0)
    chosen = [choose(exploiting, Known(**useful), range(20), 3, number=1, seed=seed) for seed in range(50)]
    assert sum(client < 3 for some in chosen for client in some) > 0.9 * 150


@pytest.mark.parametrize(("now", "pace"), [(10.0, 40.0), (15.0, 30.0), (100.0, 20.0)])
def test_the_pacer_waits_longer_where_nothing_changes(now: float, pace: float):
    """After two rounds of utility 10 and two of another: equal ones raise the pace, a leap lowers it."""
    rule = Oort(pacer_step=2)
    rule.roster, rule.history = SimpleNamespace(note=lambda *_: None), [10.0, 10.0, now]  # type: ignore[assignment]
    rule.utility = lambda client: now  # type: ignore[method-assign]
    rule.exploited = [1]
    rule.learn(4, [SimpleNamespace(client=1, outcome="completed")])  # type: ignore[list-item]
    assert rule.pace == pace


def test_a_draw_has_no_client_twice_and_those_without_a_chance_last():
    draw = np.random.default_rng(0)
    assert sorted(drawn([5, 6, 7], [0.0, 1.0, 0.0], 3, draw)) == [5, 6, 7]
    assert drawn([5, 6, 7], [0.0, 1.0, 0.0], 1, draw) == [6]


@pytest.mark.parametrize("rule", OFFERING)
def test_it_does_not_matter_where_clients_train_or_whether_the_run_was_cut_short(settings, tmp_path, rule: str):
    ways = every_way(settings(*MIXED, f"participants={rule}", "checkpoint_s=0"), tmp_path)
    assert all(rows == ways["one"] for rows in ways.values())
    assert {len(row["cohort"]) for row in ways["one"][1:]} == {3}


@pytest.mark.parametrize("rule", ["oort", "power_of_choice"])
@pytest.mark.parametrize("until", [1, 2])
def test_what_a_rule_has_learned_is_in_the_checkpoint(go, tmp_path, rule: str, until: int):
    given = (*MIXED, f"participants={rule}", "rounds=4")
    go("whole", *given)
    go("cut", *given, until=until)
    go("cut", *given, resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


@pytest.mark.parametrize("method", ["fedbuff", "fedasync"])
def test_rules_choose_for_buffers_too(go, tmp_path, method: str):
    loop = ("loop.concurrency=3", *(("loop.buffer_size=2",) if method == "fedbuff" else ()))
    given = (*MIXED, f"method={method}", *loop, "participants=oort", "rounds=5")
    go("whole", *given)
    go("cut", *given, until=3)
    go("cut", *given, resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_what_a_rule_asks_is_paid(run, tmp_path):
    """Six candidates download the model and run it forward over their examples; before, all twelve told their size."""
    run(*MIXED, "participants=power_of_choice", "rounds=1")
    rows = read_all_rows(tmp_path)
    asked = rows[rows["phase"] == "query.participants"]
    sizes, losses = asked[asked["down_bytes"] == 0], asked[asked["down_bytes"] > 0]
    assert (len(sizes), len(losses)) == (12, 6)
    trained = rows[rows["phase"] == "train"]
    assert set(losses["down_bytes"]) == set(trained["down_bytes"])
    assert (losses["flops"] > 0).all()
    assert (asked["joules"] > 0).all()
    assert set(losses["up_bytes"]) == {16}


def test_where_nobody_is_connected_time_passes(federation):
    away = ("fleet.availability._target_=devices.availability.Diurnal", "+fleet.availability.hours=0.0003")
    made = federation("participants=least_often", *away)
    reports = [report for report, _ in made.rounds()]
    assert [report.now_s for report in reports] == [0, 60, 120]
    assert [report.cohort for report in reports] == [(), (), ()]


@pytest.mark.parametrize("returned", [[0, 0], [-1], [1.5], ["a"], None, 3, [0, 1, 2, 3]])
def test_a_rule_must_choose_among_the_free(federation, returned):
    made = federation("participants=least_often")
    made.participants.choose = lambda *_: returned
    sentence = f"LeastOften.choose must return at most 3 of the clients that are free, each once, got {returned!r}"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        list(made.rounds())


def test_a_rule_that_asks_first_has_no_place_where_nobody_waits(settings):
    tree = settings("method=fedbuff", "participants=power_of_choice")
    with pytest.raises(ConfigError, match="participants=power_of_choice asks clients before a round"):
        Federation(build_world(json.dumps(tree)), LocalEngine(serve))


@pytest.mark.parametrize(
    ("limits", "known"),
    [
        ({"deadline_s": 1.0}, {0: 0.64, 1: 0.94, 2: math.nextafter(1, 2), 3: math.nextafter(1, 2)}),
        ({"keep": 2}, {0: 0.64, 1: 0.94, 2: 0.94, 3: 0.94}),
        ({}, {0: 0.64, 1: 0.94, 2: 1.24, 3: 1.54}),
    ],
)
def test_of_whom_nobody_waited_for_only_the_waiting_is_known(limits, known: dict[int, float]):
    """Clients 0 to 3 take 0.64, 0.94, 1.24 and 1.54 s; the server gives up at 1 s, or after two replies."""
    grid = edge(**limits)
    brought = grid.exchange([Message(RecordDict({"arrays": WEIGHTS}), client, "train") for client in range(4)])
    roster = Roster(grid, grid.latency, NETWORK, WEIGHTS, 0, limits.get("deadline_s"))
    roster.note(1, brought.reports)
    assert {client: seen.seconds for client, seen in roster.seen.items()} == pytest.approx(known)
    if "deadline_s" in limits:
        assert roster.of(2).seconds > 1.0, "or it would count as one that is in time"


@pytest.mark.parametrize("method", options("method"))
def test_every_method_takes_the_clients_that_it_is_offered(federation, method: str):
    from test_methods import NEEDS

    made = federation(f"method={method}", *NEEDS.get(f"method={method}", ()), "participants=least_often", "rounds=2")
    cohorts = [set(report.cohort) for report, _ in made.rounds()][1:]
    if not made.loop.is_buffered:
        assert cohorts[0] | cohorts[1] == set(range(6))


def test_a_run_is_re_priced_where_others_would_not_have_been_chosen(go, tmp_path):
    """Who was least often asked does not depend on devices; who is fast does."""
    go("often", *MIXED, "participants=least_often")
    go("fast", *MIXED, "participants=oort")
    again = api.reprice(tmp_path / "often", fleet="sbc", out=str(tmp_path / "there"), progress=False)
    assert [row["cohort"] for row in rounds_in(again.folder)] == [
        row["cohort"] for row in rounds_in(tmp_path / "often")
    ]
    with pytest.raises(ConfigError, match="clients are chosen by the seconds that they take"):
        api.reprice(tmp_path / "fast", fleet="sbc", out=str(tmp_path / "nowhere"), progress=False)


def test_oort_explores_less_from_round_to_round_however_often_it_chooses():
    """Half of single choices explore at a share of a half; a share falls once a round."""
    roster = Known(**{f"c{client}": Seen(1, 10, 1.0, 1.0, 1) for client in range(10)})
    rule = Oort(exploration=0.5, exploration_decay=1.0, exploration_min=0.0)
    chosen = [choose(rule, roster, range(20), 1, number=2, seed=seed)[0] for seed in range(200)]
    assert 70 < sum(client >= 10 for client in chosen) < 130
    falling = Oort(exploration=0.5, exploration_decay=0.5, exploration_min=0.0)
    for number in (1, 1, 1, 2, 2):
        choose(falling, roster, range(20), 1, number=number)
    assert falling.exploration == 0.125
