"""The command line: one file per verb, each of which turns arguments into a call."""

from __future__ import annotations

import typer

from mezo.cli.doctor import doctor
from mezo.cli.eval import evaluate
from mezo.cli.export import export
from mezo.cli.generate import generate
from mezo.cli.options import SettingsCommand
from mezo.cli.plot import plot
from mezo.cli.replay import replay
from mezo.cli.train import train
from mezo.cli.verify import verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # rich cuts long names
    help="Train LoRA adapters with forward passes only (MeZO), inside the engine that serves them.",
)
app.command(cls=SettingsCommand)(train)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(export)
app.command()(plot)
app.command()(replay)
app.command()(verify)
app.command()(doctor)
