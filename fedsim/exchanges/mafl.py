"""What both halves of mean augmented federated learning know (strategies/mafl.py, clients/trainers/mixing/naivemix.py).

Records: averages, up, once for each version of a client's data: x [groups, *input], y [groups, classes], and for uint8
low, step [groups]; room, up with them: bytes [] int64 that the device has left beside training, version [] int64 of the
data. pool, down: the pairs that a client does not hold yet, in the form of averages, to be put behind the first
`pool-kept` of those that it has and that are not among the rows [pairs] int64 of pool-dropped, down; that makes
`pool-size` in all. An update's metric data_version tells when its client's data have changed: it is asked again.
"""

from __future__ import annotations

QUESTION = "averages"  # asked with these settings:
GROUP_SIZE, MIN_GROUP_SIZE, POOL_DTYPE = "group-size", "min-group-size", "pool-dtype"  # a group of 0: all of a client
AVERAGES, ROOM, POOL, DROPPED = "averages", "room", "pool", "pool-dropped"  # records
SIZE, KEPT = "pool-size", "pool-kept"  # settings that come with a pool
VERSION = "data_version"  # metric of updates
