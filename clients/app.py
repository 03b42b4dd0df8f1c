"""The Flower ClientApp: the same worker serves in this process, in Ray's actors and on Flower's SuperNodes."""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.worker import worker_for as worker_for
from fedsim.errors import no_exit
from fedsim.messages.cohort import CohortAnswer, CohortTask
from fedsim.messages.packing import pack_answer, unpack_task

app = ClientApp()


def serve(task: CohortTask) -> Iterator[CohortAnswer]:
    """Lets the worker of this process do a task; one without clients builds the worker."""
    with no_exit():
        worker = worker_for(task.settings)
    yield from worker.serve(task)


def handle(message: Message, _: Context) -> Message:
    """Handles every kind of cohort message; the task in it says which."""
    answers = list(serve(unpack_task(message.content)))
    return Message(pack_answer(CohortAnswer.joined(answers)), reply_to=message)


app.train()(handle)
app.evaluate()(handle)
app.query()(handle)
