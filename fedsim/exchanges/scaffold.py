"""What both halves of SCAFFOLD know (strategies/scaffold.py, clients/trainers/drift/scaffold.py).

Records: variate, both ways, by weight, like the weights: down, from the second round on, the server's c; up, by how
much the client's c_i has changed.
"""

from __future__ import annotations

VARIATE = "variate"  # record
