"""The rows of `clients/*.parquet`: one for each client and exchange."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.report import strict_json

if TYPE_CHECKING:
    from devices.cost import Work
    from fedsim.grid.exchange import ClientReport

AT_ONCE = 20_000  # rows of a chunk: its texts must stay below 2 GiB


def client_schema() -> Any:
    """Returns names and types of the columns, as a pyarrow Schema."""
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


def client_table(reports: Sequence[ClientReport]) -> Any:
    """Returns a pyarrow Table with a row per report; `metrics` and `work` are JSON texts: methods differ in them.

    Raises:
        ValueError: if there are none.
    """
    import pyarrow as pa

    return pa.concat_tables([_table(reports[start : start + AT_ONCE]) for start in range(0, len(reports), AT_ONCE)])


def confusion_table(labels: Sequence[str], predicted: Sequence[str], counts: Sequence[int]) -> Any:
    """Returns how often each class was taken for each as a pyarrow Table with a row per cell that holds any."""
    import pyarrow as pa

    columns = ((labels, pa.string()), (predicted, pa.string()), (counts, pa.int64()))
    return pa.table([_array(*column) for column in columns], names=["label", "predicted", "count"])


def _table(reports: Sequence[ClientReport]) -> Any:
    import pyarrow as pa

    schema, networks = client_schema(), dict[int, str]()
    columns = zip(*(_row(report, networks) for report in reports), strict=True)
    return pa.Table.from_arrays([_array(c, kind) for c, kind in zip(columns, schema.types, strict=True)], schema=schema)


def _row(c: ClientReport, networks: dict[int, str]) -> tuple[Any, ...]:
    """Returns the figures in the order of the schema."""
    cost, work = c.cost, c.work
    return (
        *(c.round, c.phase, c.client, c.device, c.outcome, c.reason),
        *(c.start_s, cost.down_s, cost.compute_s, cost.up_s, c.wait_s, cost.total_s),
        *(cost.down_joules, cost.compute_joules, cost.up_joules, cost.tail_joules, c.joules, c.wait_joules),
        *(work.down_bytes, work.up_bytes, work.peak_memory_bytes, work.storage_bytes, work.flops, c.num_examples),
        *(strict_json.dumps(c.metrics), work_text(c.whole_work, networks)),
    )


def work_text(work: Work, networks: dict[int, str]) -> str:
    """Returns the JSON text of `Work.to_dict`; `networks` caches the text of each network by id."""
    passes = []
    for p in work.passes:
        if id(p.network) not in networks:
            networks[id(p.network)] = strict_json.dumps(vars(p.network))
        counts = f'"batch": {p.batch}, "forwards": {p.forwards}, "backwards": {p.backwards}'
        passes.append(f'{{"network": {networks[id(p.network)]}, {counts}}}')
    figures = strict_json.dumps(work.figures())
    return f'{{"passes": [{", ".join(passes)}], {figures[1:]}'


def _array(values: Sequence[Any], kind: Any) -> Any:
    """Makes a column without nulls from its buffers: `pyarrow.array` would import pandas to look for its types."""
    import pyarrow as pa

    if kind == pa.string():
        texts = [text.encode("utf-8", "backslashreplace") for text in values]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    else:
        buffers = [None, pa.py_buffer(np.array(values, np.int64 if kind == pa.int64() else np.float64))]
    return pa.Array.from_buffers(kind, len(values), buffers)
