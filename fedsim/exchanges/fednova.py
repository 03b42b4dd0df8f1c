"""What both halves of FedNova know (strategies/fednova.py, clients/trainers/drift/fednova.py).

Records: way, up: steps [] int64, taken in the round (tau_i); norm [] float64, the sum of the gradients' weights in the
client's way (||a_i||_1). 16 bytes.
"""

from __future__ import annotations

WAY = "way"  # record
STEPS, NORM = "steps", "norm"  # its tensors
