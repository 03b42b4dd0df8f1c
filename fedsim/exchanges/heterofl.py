"""What both halves of HeteroFL know (strategies/heterofl.py, clients/trainers/widths/heterofl.py).

Records: statistics, up, asked before the weights are judged: for each batch norm running_mean and running_var [channels
of the part] float32, examples [] int64. classes, up where labels are masked: bits [ceil(classes / 8)] uint8, which of
them the client has examples of. Else those of `strategies.subnet`.
"""

from __future__ import annotations

QUESTION = "statistics"
STATISTICS, CLASSES = "statistics", "classes"  # records
EXAMPLES = "examples"  # in statistics
MOMENTS = ("running_mean", "running_var")
