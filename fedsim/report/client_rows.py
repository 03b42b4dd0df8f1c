"""The rows of `clients/*.parquet`: one for each client and exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedsim.report import strict_json

if TYPE_CHECKING:
    from fedsim.grid.edge import ClientReport


def client_schema() -> Any:
    """Names and types of the columns."""
    import pyarrow as pa

    texts = ("phase", "device", "outcome", "reason", "metrics", "work")
    whole = ("round", "client", "num_examples", "down_bytes", "up_bytes", "peak_memory_bytes", "storage_bytes")
    columns = [
        "round phase client device outcome reason start_s down_s compute_s up_s wait_s total_s",
        "down_joules compute_joules up_joules tail_joules joules wait_joules",
        "down_bytes up_bytes peak_memory_bytes storage_bytes flops num_examples metrics work",
    ]
    kinds = {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(whole, pa.int64())}
    return pa.schema([(name, kinds.get(name, pa.float64())) for name in " ".join(columns).split()])


def client_row(c: ClientReport) -> dict[str, Any]:
    """One row; `metrics` and `work` are JSON texts, because methods differ in what they report."""
    return {
        "round": c.round,
        "phase": c.phase,
        "client": c.client,
        "device": c.device,
        "outcome": c.outcome,
        "reason": c.reason,
        "start_s": c.start_s,
        "down_s": c.cost.down_s,
        "compute_s": c.cost.compute_s,
        "up_s": c.cost.up_s,
        "wait_s": c.wait_s,
        "total_s": c.cost.total_s,
        "down_joules": c.cost.down_joules,
        "compute_joules": c.cost.compute_joules,
        "up_joules": c.cost.up_joules,
        "tail_joules": c.cost.tail_joules,
        "joules": c.joules,
        "wait_joules": c.wait_joules,
        "down_bytes": c.work.down_bytes,
        "up_bytes": c.work.up_bytes,
        "peak_memory_bytes": c.work.peak_memory_bytes,
        "storage_bytes": c.work.storage_bytes,
        "flops": c.work.flops,
        "num_examples": c.num_examples,
        "metrics": strict_json.dumps(c.metrics),
        "work": strict_json.dumps(c.work.to_dict()),
    }
