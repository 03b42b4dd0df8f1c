"""Small federations with prototype-based personalised pruning (PPP), and what their clients send."""

from conftest import answered, sent_to, task_of

from clients.worker import Worker
from fedsim.messages.records import record_of, update_of

IMAGES = ("workload.input_shape=[1,16,16]", "workload.separation=16")
PPP = ("method=ppp", "trainer.batch_size=4", "strategy.warmup=0")
MASKED = (*PPP, "strategy.train_mode=masked")
MODELS = {
    "mlp": ("model=mlp", "model.hidden=[12,9]", "workload.input_shape=[6]"),
    "lenet5": ("model=lenet5", *IMAGES),
    "small_cnn": ("model=small_cnn", "model.width=6", "model.hidden=12", *IMAGES),
    "femnist_cnn": ("model=femnist_cnn", "model.hidden=12", *IMAGES),
    "vgg": ("model=vgg", "model.width=4", "model.hidden=8", *IMAGES),
    "resnet8": ("model=resnet8", "model.width=8", "model.groups=4", *IMAGES),
    "nb201": ("model=nb201", "model.channels=4", "model.cells=1", "model.norm=batch", *IMAGES),
}


def start(federation, *overrides: str, round: int = 1):
    """Federation, worker, and the id, records and context of the first client of a round."""
    made = federation(*overrides)
    message = min(made.instructions(round), key=lambda m: m.metadata.dst_node_id)
    worker, part = Worker(made.world), message.content
    client = worker.context(task_of(part, message.metadata.dst_node_id, round))
    return made, worker, part, client, sent_to(worker, client, part)


def uplinks(made, worker_rounds: int):
    """What every client sent in some rounds: round, records without state, and the strategy's new state after it."""
    worker = Worker(made.world)
    for number in range(1, worker_rounds + 1):
        messages, replies = made.instructions(number), []
        for message in messages:
            client = message.metadata.dst_node_id
            answer = answered(
                worker, worker.context(task_of(message.content, client, number)), message.content, "train"
            )
            replies.append((client, message.content, answer))
        yield number, worker, replies
        updates = [update_of(answer, client) for client, _, answer in replies]
        made.take(number, record_of(made.strategy.combine(number, updates)))
