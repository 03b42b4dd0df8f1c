"""How rounds follow each other: all clients of a cohort together, or each in its own time.

A loop brings the replies of which the next global weights are made; `Federation` makes them.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from flwr.app import Message

from devices.bounds import Checked
from fedsim.errors import ConfigError
from fedsim.grid import flights
from fedsim.grid.contact import Contact
from fedsim.grid.edge import EMPTY_ROUND_S, EdgeGrid
from fedsim.grid.exchange import ClientReport, Exchange, Origin
from fedsim.grid.memory import memory_of
from fedsim.grid.server_half import ServerHalf
from fedsim.messages.records import ARRAYS
from fedsim.seeding import seeded_globals
from fedsim.settings.run_settings import RunSettings

TOO_STALE = "the weights had changed more than max_staleness times since it was sent them"
AHEAD = 16  # clients that train at once where fewer are waited for: others in flight do their work beforehand
FUTILE = 20  # clients in a row, at least, from which nothing came: then a round ends without a reply
DRAWS = 8  # tries to draw clients of which each is idle and online, before all are looked through

Instruct = Callable[[int, Sequence[int] | None, int], list[Message]]


class Loop(Checked, ABC, group="loop", error=ConfigError):
    """Brings the replies of a round.

    Attributes:
        is_buffered: clients come in their own time; their replies may be stale.
        pauses: a client that goes offline goes on with its work when it is back.
    """

    is_buffered: ClassVar[bool] = False
    pauses: bool = False

    def check(self, settings: RunSettings, strategy: ServerHalf, name: str) -> None:
        """Refuses what does not go with this loop.

        Args:
            settings: of the run.
            strategy: of the run.
            name: of the strategy.

        Raises:
            ConfigError: says what does.
        """
        if strategy.needs_buffer:
            raise ConfigError(f"{name} takes single replies as they come; set loop=buffer and loop.buffer_size=1")

    @abstractmethod
    def exchange(self, grid: EdgeGrid, number: int, instruct: Instruct) -> Exchange:
        """Lets time pass until the next global weights can be made.

        Args:
            grid: to the clients.
            number: of the round.
            instruct: makes the messages of a round, for the clients given or those that the strategy draws, for the
                so-many-th time in it.
        """

    @contextmanager
    def beside(self, grid: EdgeGrid) -> Iterator[None]:
        """Lets exchanges beside training take place, for which the round waits."""
        yield

    def state(self, grid: EdgeGrid) -> dict[str, Any]:
        """Returns what later rounds depend on, its attributes; to be asked between two of them."""
        own = memory_of(self)
        return {"own": own} if own else {}

    def restore(self, grid: EdgeGrid, state: dict[str, Any]) -> None:
        """Goes on where another loop of the same run was."""
        vars(self).update(state.get("own", {}))


class RoundLoop(Loop):
    """Synchronous rounds: a cohort is asked, and the round closes when it has answered, or at the deadline."""

    def exchange(self, grid: EdgeGrid, number: int, instruct: Instruct) -> Exchange:
        """One exchange with the cohort that the strategy draws, or is offered."""
        clients = None if grid.choose is None else grid.choose(number, None, 0)
        if clients == []:
            grid.clock.advance(EMPTY_ROUND_S)
            return Exchange([])
        return grid.exchange(instruct(number, clients, 0))


class BufferLoop(Loop):
    """Buffered asynchronous rounds: a client that has answered is replaced at once, every so many replies are used.

    At one instant, clients arrive first, by id; those that fill the buffer are used, and only then others are sent
    out. A client that drops out makes room for another one, as one that answers.

    Args:
        concurrency: clients that are at work at once, as far as so many can be reached.
        buffer_size: replies of which new weights are made.
        max_staleness: a reply to weights that have changed more often since is not used; None uses all.
        staleness_weight: what a reply counts for to weights that have changed s times since: "constant" 1,
            "polynomial" (1 + s)^-power, "hinge" 1 up to s = grace and 1 / (power (s - grace) + 1) beyond.
        staleness_power: a of the last two.
        staleness_grace: b of the last one.
        on_offline: "lose": the work of a client that goes offline is lost, as in rounds; "pause": it goes on with it
            when it is back.

    Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022, algorithm 1; the
    weights from Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, section 5.2 (recalled).
    """

    is_buffered: ClassVar[bool] = True

    def __init__(
        self,
        concurrency: Annotated[int, Ge(1), Le(10**6)] = 20,
        buffer_size: Annotated[int, Ge(1), Le(10**6)] = 10,
        max_staleness: Annotated[int, Ge(0)] | None = None,
        staleness_weight: Literal["constant", "polynomial", "hinge"] = "polynomial",
        staleness_power: Annotated[float, Gt(0), Le(100)] = 0.5,
        staleness_grace: Annotated[int, Ge(0)] = 4,
        on_offline: Literal["lose", "pause"] = "lose",
    ):
        self.concurrency, self.buffer_size, self.max_staleness = concurrency, buffer_size, max_staleness
        self.staleness_weight, self.staleness_power = staleness_weight, staleness_power
        self.staleness_grace, self.pauses = staleness_grace, on_offline == "pause"
        self.number, self.draws = 0, 0  # of the round, and how often clients were drawn in it
        self.unchanged: list[int] = []  # rounds that left the weights as they were, while clients were in flight
        self.repeats: dict[int, int] = {}  # how often clients were sent out in it

    def check(self, settings: RunSettings, strategy: ServerHalf, name: str) -> None:
        """Refuses strategies that would take stale replies for fresh ones, and settings of cohorts."""
        if not strategy.takes_stale:
            raise ConfigError(
                f"{name} takes all replies for fresh ones, and those of loop=buffer are not; take strategy=fedbuff "
                "or strategy=fedasync, or set loop=rounds; one of your own derives from strategies.stale.StaleStrategy"
            )
        if strategy.needs_buffer and self.buffer_size != 1:
            raise ConfigError(f"{name} takes single replies, and loop.buffer_size={self.buffer_size}; set it to 1")
        if settings.cohort != self.concurrency:
            raise ConfigError(
                f"cohort={settings.cohort} is the size of synchronous rounds; with loop=buffer set loop.concurrency, "
                "the clients at work at once, and leave cohort out (cohort=null where an experiment sets it)"
            )
        for key, value, usual in (
            ("over_selection", settings.over_selection, 1.0),
            ("round_every_s", settings.round_every_s, None),
            ("engine.batch_clients", settings.engine.batch_clients, 1),
        ):
            if value != usual:
                raise ConfigError(f"{key}={value} is for synchronous rounds; leave it out with loop=buffer")

    def weight(self, staleness: int) -> float:
        """Returns what a reply counts for."""
        power, late = self.staleness_power, staleness - self.staleness_grace
        if self.staleness_weight == "constant":
            return 1.0
        if self.staleness_weight == "polynomial":
            return float((1 + staleness) ** -power)
        return 1.0 if late <= 0 else 1 / (power * late + 1)

    def exchange(self, grid: EdgeGrid, number: int, instruct: Instruct) -> Exchange:
        """Lets clients arrive until there are enough replies, or fewer where nothing more comes."""
        if number != self.number:
            self.number, self.draws, self.repeats = number, 0, {}
        grid.train_again()
        if self.unchanged:  # whoever has arrived since asks no more
            oldest = min((contact.number for _, contact in grid.in_flight), default=math.inf)
            self.unchanged = [idle for idle in self.unchanged if idle >= oldest]
        ended: list[Contact] = []
        while len(_accepted(ended)) < self.buffer_size:
            if grid.in_flight.next_s > grid.clock.now_s:
                self.send(grid, number, instruct)
            if not grid.in_flight or _in_a_row(ended) >= max(FUTILE, 2 * self.concurrency):
                break
            ended.append(self.arrived(grid, number))
            if len(_accepted(ended)) == self.buffer_size:
                grid.train(ended, self.ahead(grid, ended))  # some may fail
        grid.train(ended)
        if not (used := _accepted(ended)):
            self.unchanged.append(number)
            if not any(c.cost.total_s for c in ended):
                grid.clock.now_s = min(grid.clock.now_s + EMPTY_ROUND_S, grid.first_idle_s())
        return self.brought(grid, number, ended, used)

    def arrived(self, grid: EdgeGrid, number: int) -> Contact:
        """The next client of whom the server hears."""
        contact = grid.arrive()
        if self.max_staleness is not None and self.staleness(number, contact) > self.max_staleness:
            contact.late = contact.late or TOO_STALE
        if not contact.is_planned:
            grid.serving.store_state(contact)
        return contact

    def ahead(self, grid: EdgeGrid, ended: Sequence[Contact]) -> list[Contact]:
        """Clients in flight that train beside those that have arrived, so that no worker waits."""
        missing = AHEAD - sum(contact.is_planned for contact in ended)
        return [contact for _, contact in grid.in_flight if contact.is_planned][: max(0, missing)]

    def brought(self, grid: EdgeGrid, number: int, ended: Sequence[Contact], used: Sequence[Contact]) -> Exchange:
        """What the round brought: its replies by client, and what became of everyone who arrived."""
        reports = tuple(self.report(grid, number, contact) for contact in ended)
        grid.reports += reports
        ordered = sorted(used, key=lambda contact: (contact.client, contact.start_s))
        origins = [self.origin(self.staleness(number, contact), contact) for contact in ordered]
        replies = [contact.reply() for contact in ordered]
        return Exchange(replies, tuple(contact.client for contact in ordered), reports, tuple(origins))

    def report(self, grid: EdgeGrid, number: int, contact: Contact) -> ClientReport:
        """What became of a client, with the age of what it was sent."""
        noted = {"staleness": float(self.staleness(number, contact))}
        if self.pauses:
            noted["paused_s"] = contact.priced.paused_s
        return grid.report(contact, noted=noted)

    def staleness(self, number: int, contact: Contact) -> int:
        """Returns how often the weights have changed since a client was sent them."""
        return number - contact.number - sum(contact.number <= idle < number for idle in self.unchanged)

    def origin(self, staleness: int, contact: Contact) -> Origin:
        """What a reply started from."""
        return Origin(contact.message.content.array_records[ARRAYS], staleness, self.weight(staleness))

    # --- who is sent out ----------------------------------------------------------------------------------------------

    def send(self, grid: EdgeGrid, number: int, instruct: Instruct) -> None:
        """Sends out as many clients as there is room for, of those that are idle and can be reached."""
        room = self.concurrency - len(grid.in_flight)
        chosen = self.draw(grid, number, room) if room > 0 else []
        if not chosen:
            return
        grid.dispatch(instruct(number, chosen, self.draws), self.repeats)
        self.draws += 1
        for client in chosen:
            self.repeats[client] = self.repeats.get(client, 0) + 1

    def draw(self, grid: EdgeGrid, number: int, room: int) -> list[int]:
        """Returns the clients that a rule chooses, or draws them, each with the same chance."""
        if grid.choose is not None:
            return grid.choose(number, room, self.draws)
        everyone, chosen = range(len(grid.fleet)), dict[int, None]()

        def free(client: int) -> bool:
            return client not in chosen and grid.can_be_sent(client)

        def take(some: Sequence[int]) -> None:
            chosen.update(dict.fromkeys([client for client in some if free(client)][: room - len(chosen)]))

        again = (self.draws,) if self.draws else ()
        with seeded_globals(grid.serving.seed, "cohort", number, *again):
            for _ in range(DRAWS):
                take(random.sample(everyone, min(room, len(everyone))))
                if len(chosen) == room or len(everyone) <= room:
                    return sorted(chosen)
            left = list(filter(free, everyone))
            take(random.sample(left, min(room - len(chosen), len(left))))
        return sorted(chosen)

    @contextmanager
    def beside(self, grid: EdgeGrid) -> Iterator[None]:
        """Lets exchanges beside training take place, for which nobody waits: those in flight are on their way."""
        now_s = grid.clock.now_s
        yield
        grid.clock.now_s = now_s

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state(self, grid: EdgeGrid) -> dict[str, Any]:
        """Returns who is in flight."""
        return {**super().state(grid), **flights.packed(grid)}

    def restore(self, grid: EdgeGrid, state: dict[str, Any]) -> None:
        """Puts clients in flight again."""
        super().restore(grid, state)
        flights.restore(grid, state)


def _accepted(ended: Sequence[Contact]) -> list[Contact]:
    return [contact for contact in ended if contact.is_accepted]


def _in_a_row(ended: Sequence[Contact]) -> int:
    """Returns how many of the last clients brought nothing."""
    for count, contact in enumerate(reversed(ended)):
        if contact.is_accepted:
            return count
    return len(ended)
