"""What FedMix and NaiveMix send: what both halves of mean augmented federated learning know.

The halves are strategies/mafl.py and clients/trainers/mixing/naivemix.py. Records, beside the weights:

averages, up, once for each version of a client's data:
    x [groups, *input], y [groups, classes]; as uint8 also low and step, [groups] each
room, up with them:
    bytes [] int64, what the device has left beside training; version [] int64, of the data
pool, down:
    the pairs that a client does not hold yet, in the form of averages; they go behind the first `pool-kept` of those
    that it has, less the rows of pool-dropped, and make `pool-size` in all
pool-dropped, down:
    rows [pairs] int64 of the pairs to forget

An update's metric data_version tells when a client's data have changed: it is asked again.
"""

from __future__ import annotations

QUESTION = "averages"  # asked with these settings:
GROUP_SIZE, MIN_GROUP_SIZE, POOL_DTYPE = "group-size", "min-group-size", "pool-dtype"  # a group of 0: all of a client
AVERAGES, ROOM, POOL, DROPPED = "averages", "room", "pool", "pool-dropped"  # records
SIZE, KEPT = "pool-size", "pool-kept"  # settings that come with a pool
VERSION = "data_version"  # metric of updates
