"""Who is in flight, for a checkpoint: what each client was sent and when it arrives, and not what it will answer.

A client's update is a function of what it was sent, of what it keeps and of draws by name: it can be made again.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flwr.app import Message, RecordDict

from devices.cost import Cost, pack_works, unpack_works
from fedsim.grid.events import Event
from fedsim.grid.pricing import Priced
from fedsim.messages.cohort import ClientAnswer

if TYPE_CHECKING:
    from fedsim.grid.contact import Contact
    from fedsim.grid.edge import EdgeGrid


def packed(grid: EdgeGrid) -> dict[str, Any]:
    """Returns the clients in flight as numbers, texts and records."""
    flying = list(grid.in_flight)
    contents = {id(contact.message.content): contact.message.content for _, contact in flying}
    places = {key: place for place, key in enumerate(contents)}
    return {
        "dispatched": grid.dispatched,
        "busy_until_s": dict(grid.busy_until_s),
        "contents": [dict(content) for content in contents.values()],
        "clients": [_row(event, contact, places) for event, contact in flying],
        **pack_works([contact.answer.work for _, contact in flying]),
    }


def restore(grid: EdgeGrid, state: dict[str, Any]) -> None:
    """Puts the clients of a checkpoint in flight; those that had trained at once have to do so again."""
    grid.dispatched, grid.busy_until_s = state["dispatched"], dict(state["busy_until_s"])
    contents = [RecordDict(content) for content in state["contents"]]
    together: dict[tuple[int, float], list[dict[str, Any]]] = defaultdict(list)
    for row, work in zip(state["clients"], unpack_works(state), strict=True):
        together[row["number"], row["start_s"]].append({**row, "work": work})
    for (number, start_s), rows in together.items():
        messages = [Message(contents[row["content"]], row["client"], "train") for row in rows]
        repeats = {row["client"]: row["repeat"] for row in rows}
        contacts = grid.serving.reach(grid.in_client_order(messages), number, start_s, repeats)
        found = {row["client"]: row for row in rows}
        for contact in contacts:
            row = found[contact.client]
            contact.answer = ClientAnswer(contact.client, work=row["work"], num_examples=row["num_examples"])
            contact.late, contact.trains_at_once = row["late"], row["trains_at_once"]
            contact.can_be_planned = row["can_be_planned"]
            contact.is_planned = row["trains_at_once"] or row["can_be_planned"]
            contact.priced = Priced(**{**row["priced"], "cost": Cost(**row["priced"]["cost"])})
            grid.in_flight.put(Event(row["heard_s"], contact.client, row["dispatch"]), contact)


def _row(event: Event, contact: Contact, places: dict[int, int]) -> dict[str, Any]:
    return {
        "client": contact.client,
        "dispatch": event.dispatch,
        "heard_s": event.time_s,
        "start_s": contact.start_s,
        "number": contact.number,
        "repeat": contact.repeat,
        "content": places[id(contact.message.content)],
        "late": contact.late,
        "can_be_planned": contact.can_be_planned,
        "trains_at_once": contact.trains_at_once,
        "num_examples": contact.answer.num_examples,
        "priced": asdict(contact.priced),
    }
