"""The app of Flower's server: `flwr run` gives the same run as `fedsim run`, on Flower's own engine."""

from __future__ import annotations

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedsim.report import strict_json
from fedsim.report.place import new_run_folder
from fedsim.runs.writer import run
from fedsim.settings.compose import from_run_config
from fedsim.settings.run_settings import RunSettings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment of the run config. A failure leaves `failure.json` in the run folder."""
    from fedsim.engines.flower.engine import FlowerEngine
    from fedsim.engines.session_folder import usual_files

    usual_files()  # the run folder is the user's, and no part of the session
    settings = from_run_config(dict(context.run_config))
    typed = RunSettings.of(settings)
    with new_run_folder(typed) as out:
        print(f"run folder: {out.resolve()}", flush=True)
        torch.set_num_threads(typed.engine.threads)
        summary = run(settings, FlowerEngine(grid), out, watch=lambda report: print(report.to_json(), flush=True))
    print(strict_json.dumps(summary), flush=True)
