"""Federated and on-device learning judged as an edge workload: accuracy against time, energy, memory and bytes."""

__version__ = "0.1.0"
