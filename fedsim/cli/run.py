"""`fedsim run`: one experiment, or a sweep of them."""

from __future__ import annotations

import gc
from typing import Any

import typer

from fedsim.cli.hydra_run import run_with_hydra

RUN_EPILOG = """
[bold]Examples[/bold]

fedsim run

fedsim run method=fedprox fleet=mixed rounds=50 seed=3

fedsim run workload=mnist_writers cohort=20 deadline_s=30 out=runs/deadline

fedsim run -m strategy=fedavg,fedadam seed=1,2,3

fedsim run --config-path $PWD/runs/A --config-name config out=B     (repeats run A)

[bold]Settings[/bold]: rounds= seed= cohort= num_clients= over_selection= deadline_s= round_every_s= target=
target_accuracy= patience_rounds= max_simulated_s= evaluate_every= evaluate_clients= private= checkpoint_s=
on_client_error= out= name=

[bold]Code[/bold]: a _target_ may name fedsim's own classes, Flower's strategies, torch.nn, torchvision.models, plug-ins
and modules of the working folder; anything else is named once more with --allow-target NAME, here and with resume,
replay, study and flwr.

[bold]Groups[/bold]: {groups}

Anything below a group can be set too, e.g. trainer.lr=0.05 partition.classes_per_client=3; the whole tree is printed by
fedsim run --cfg job
"""


class RunCommand(typer.core.TyperCommand):
    """Fills the option names into the help only when it is asked for."""

    def get_help(self, ctx: Any) -> str:
        """Returns the help with the options of every group."""
        from fedsim.settings.groups import GROUPS, options

        groups = "\n\n".join(f"{group}= {' '.join(options(group))}" for group in GROUPS if options(group))
        self.epilog = RUN_EPILOG.format(groups="\n\n" + groups)
        return super().get_help(ctx)


def run(ctx: typer.Context) -> None:
    """Run one experiment, or a sweep with -m. Overrides have Hydra's syntax: KEY=VALUE."""
    gc.disable()  # until the run begins: imports leave no garbage, and looking for it is an eighth of their time
    run_with_hydra(ctx.args)
