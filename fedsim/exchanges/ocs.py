"""What both halves of federated coresets know (strategies/ocs.py, clients/trainers/rehearsal/replay.py and ocs.py).

Records: reference, both ways, only with trainer.ref_scope=global: direction [weights] float32 of length 1, the gradient
of the coreset (down: of all of them); examples [] int64, up. The coresets stay where they are.
"""

from __future__ import annotations

QUESTION = "end_of_task"  # makes a client pick from the task that has ended; the answer is empty
REFERENCE = "reference"  # record
