"""The command `retune`. The commands import what they need when they run, so that `retune --help` answers at once."""

from typing import Any

import typer
from typer.core import TyperGroup

from retune import (
    cli_audit,
    cli_check,
    cli_explain,
    cli_export,
    cli_forget,
    cli_lineage,
    cli_new,
    cli_rate,
    cli_read,
    cli_rollback,
    cli_run,
    cli_simulate,
    cli_stack,
)
from retune.errors import ConfigError, RetuneError

__all__ = ["app"]

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes; 0 is success."""


class _Commands(TyperGroup):
    """Shows Retune's own errors as messages, and turns them into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RetuneError as error:
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(USAGE if isinstance(error, ConfigError) else FAILED) from None
        except KeyboardInterrupt:
            typer.secho("interrupted", fg="yellow", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keeps the prompts of a frozen language model in tune with incoming data.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 reproduced with differences, 4 nothing to forget. "
    "Settings are environment variables, listed in .env.example.",
)
app.command(epilog="Example: [bold]retune up[/]   Airflow and MLflow then listen on 127.0.0.1; their state is in .retune.")(cli_stack.up)
app.command(epilog="Example: [bold]retune down[/]   Tasks that run are cut off, and tried again after the next start.")(cli_stack.down)
app.command(epilog="Example: [bold]retune status --json | jq .prompts.ticket_priority.champion[/]")(cli_stack.status)
app.command(
    epilog="Examples: [bold]retune new my_intents --from requests.csv[/], "
    "[bold]retune new my_notes --from notes.jsonl --text body --target summary --show[/]"
)(cli_new.new)
app.command(
    epilog="Examples: [bold]retune run ticket_priority --set tune.learning_rate=0.01 --reason 'slower rate'[/], [bold]retune run ingest[/]"
)(cli_run.run)
app.command(epilog="Example: [bold]retune land ticket_priority exports/2026-05.csv[/]   Then: [bold]retune run ingest[/]")(cli_run.land)
app.command(epilog="Example: [bold]retune releases ticket_priority --json[/]")(cli_read.releases)
app.command(epilog="Examples: [bold]retune ledger ticket_priority --verify[/], [bold]retune ledger dataset[/]")(cli_read.ledger)
app.command(
    epilog="Examples: [bold]retune audit ticket_priority --out history.html[/], "
    "[bold]retune audit ticket_priority --json | jq .verified[/]   Exit code 1: the record does not verify."
)(cli_audit.audit)
app.command(
    epilog="Examples: [bold]retune rollback ticket_priority --reason 'answers are worse since noon'[/], "
    "[bold]retune rollback ticket_priority --to 3 --reason 'known good'[/]"
)(cli_rollback.rollback)
app.command(epilog="Example: [bold]retune unbar ticket_priority 4 --reason 'the data were wrong, not the release'[/]")(cli_rollback.unbar)
app.command(
    epilog="Examples: [bold]retune predict ticket_priority --text 'Nothing works since noon'[/], "
    "[bold]retune predict ticket_priority --file rows.jsonl --json[/]"
)(cli_read.predict)
app.command(
    epilog="Examples: [bold]retune check ticket_priority[/], [bold]retune check ticket_priority --release previous --json[/]   "
    "Exit codes: 0 all required checks passed, 1 one failed or the release cannot be loaded, 2 the file of checks is wrong."
)(cli_check.check)
app.command(
    epilog="Examples: [bold]retune checkout[/], [bold]retune checkout 3f9c1a[/], [bold]retune checkout --data 0 --force[/]   "
    "Then: [bold]dvc pull[/]"
)(cli_lineage.checkout)
app.command(
    epilog="Examples: [bold]retune reproduce ticket_priority[/], [bold]retune reproduce ticket_priority --release 3f9c1a --keep rebuilt[/]"
)(cli_lineage.reproduce)
app.command(
    epilog="Examples: [bold]retune explain ticket_priority[/], "
    "[bold]retune explain ticket_priority --release 3f9c1a --rows 1000 --plot tokens.png[/]"
)(cli_explain.explain)
app.command(
    epilog="Examples: [bold]retune rate ticket_priority ratings-3f9c1a5be07d.json --by anna[/], "
    "[bold]retune rate ticket_priority - < ratings.json[/]"
)(cli_rate.rate)
app.command(epilog="Example: [bold]retune export ticket_priority --to exported[/]   Then: [bold]exported/README.md[/]")(cli_export.export)
app.command(
    epilog="Examples: [bold]retune forget ticket_priority --rows-file hers.csv --reason 'request 17' --dry-run[/], "
    "[bold]retune forget ticket_priority --id 3:17 --reason 'request 17'[/]   "
    "Exit codes: 0 forgotten, or finished what an earlier call left; 4 nothing that is kept holds such rows."
)(cli_forget.forget)
app.command(epilog="Examples: [bold]retune gc --dry-run[/], [bold]retune gc --older-than 30[/]")(cli_forget.gc)
app.command(epilog="Examples: [bold]retune simulate-gate[/], [bold]retune simulate-gate --looks 12 --json[/]   About ten minutes.")(
    cli_simulate.simulate_gate
)
app.command(epilog="Example: [bold]retune doctor --json | jq '.checks[] | select(.state != \"ok\")'[/]")(cli_read.doctor)


if __name__ == "__main__":
    app()
