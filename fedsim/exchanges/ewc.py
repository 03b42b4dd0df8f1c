"""What both halves of elastic weight consolidation know (strategies/ewc.py, clients/trainers/rehearsal/ewc.py).

Records: fisher, up, once per task: curvature [weights] float32, examples [] int64. penalty, down, from the second task
on: curvature, weighted [weights], constant [] float32, the sums over tasks of F, F w* and F w*^2, which is all that a
sum of quadratics needs.
"""

from __future__ import annotations

QUESTION = "fisher"  # asked when a task has ended
FISHER, PENALTY = "fisher", "penalty"  # records
