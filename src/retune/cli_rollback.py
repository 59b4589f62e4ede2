"""`retune rollback` and `unbar`: an earlier release becomes the champion again, at once and without retraining."""

import getpass
import uuid
from typing import Annotated

import typer

from retune.cli_output import AsJson, ShowCommand, console, emit, plain, reach_mlflow, shell

__all__ = ["rollback", "unbar"]

PromptName = Annotated[str, typer.Argument(help="Name of a prompt file.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the ledger.")]
By = Annotated[str | None, typer.Option("--by", help="Who, for the ledger; default: the user of this machine.")]


def rollback(
    prompt: PromptName,
    reason: Reason,
    to: Annotated[str, typer.Option("--to", help="`previous`, a version, or the beginning of a release id.")] = "previous",
    by: By = None,
    as_json: AsJson = False,
    show_command: ShowCommand = False,
) -> None:
    """Make an earlier release the champion again, and bar the one it leaves. The release is loaded and tried first."""
    import json

    from retune.settings import Settings

    settings = Settings.load()
    if show_command:
        conf = json.dumps({"prompt": prompt, "release": to, "reason": reason})
        plain(shell(["airflow", "dags", "trigger", "rollback", "--conf", conf], {"AIRFLOW_HOME": str(settings.home / "airflow")}))
        return
    reach_mlflow(settings)
    from retune.records import Trigger
    from retune.tasks.rollback import rollback

    trigger = Trigger("", f"command {uuid.uuid4()}", "manual", by or getpass.getuser(), reason)
    say = console(stderr=True)
    done = rollback(prompt, to, trigger.to_json(), log=lambda line: say.print(line, markup=False))
    if as_json:
        emit({key: value for key, value in done.items() if key != "links"})


def unbar(
    prompt: PromptName,
    release: Annotated[str, typer.Argument(help="A barred release: its version, or the beginning of its id.")],
    reason: Reason,
    by: By = None,
    as_json: AsJson = False,
) -> None:
    """Let a release that a rollback left be promoted again. It does not become the champion by that."""
    from retune.settings import Settings

    reach_mlflow(Settings.load())
    from retune.tasks.rollback import unbar

    done = unbar(prompt, release, by or getpass.getuser(), reason)
    if as_json:
        emit(done)
        return
    console().print(
        f"version {done['version']} ({done['release'][:12]}) may be promoted again (ledger entry {done['entry']})", markup=False
    )
