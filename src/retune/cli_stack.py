"""`retune up`, `down` and `status`."""

from typing import Any

from retune.cli_output import AsJson, console, emit, figures, places, when
from retune.settings import without_password

__all__ = ["down", "status", "up"]


def up(as_json: AsJson = False) -> None:
    """Start Airflow and MLflow on this machine, or say where they run."""
    from retune.local import running, start
    from retune.settings import Settings

    settings = Settings.load()
    progress = console(stderr=True)

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "migrating":
            progress.print("  first start: making Airflow's database")
        elif event["event"] == "healthy":
            progress.print(f"  {event['component']} is up")

    if running(settings) is None:
        progress.print(f"starting Airflow and MLflow in {settings.home}")
    stack, started = start(settings, show)
    if as_json:
        emit({"started": started, **places(stack)})
        return
    out = console()
    out.print("running" if started else "already running")
    out.print(f"  Airflow  {stack.airflow_url}   user {stack.user}, password in {stack.password_file}")
    out.print(f"  MLflow   {without_password(stack.mlflow_url)}")
    out.print("  stop both with `retune down`")


def down() -> None:
    """Stop this project's Airflow and MLflow and wait until they have ended."""
    from retune.local import stop
    from retune.settings import Settings

    settings = Settings.load()
    console().print("stopped" if stop(settings) else f"nothing was running in {settings.home}")


def status(as_json: AsJson = False) -> None:
    """Show each prompt's champion and last verdict, the live dataset revision, and the stack."""
    from rich.table import Table

    from retune.cli_standing import standing_report
    from retune.local import running
    from retune.settings import Settings

    settings = Settings.load()
    stack = running(settings)
    value = standing_report(settings)
    if as_json:
        emit({**value, "stack": {"running": stack is not None, "home": str(settings.home), **(places(stack) if stack else {})}})
        return
    out = console()
    table = Table("prompt", "champion", "version", "since", "metrics", "last verdict", box=None, pad_edge=False)
    for name, prompt in value["prompts"].items():
        champion, last = prompt["champion"], prompt["last"]
        table.add_row(
            name,
            champion["release"][:12] if champion else "none yet",
            str(champion["version"]) if champion else "",
            when(champion["since"]) if champion else "",
            figures(champion["metrics"]) if champion else "",
            f"{last['verdict'].upper()} {when(last['at'])}: {last['reason']}" if last else "",
        )
    out.print(table)
    dataset = value["dataset"]
    rows = ", ".join(f"{name} {count} rows" for name, count in dataset["rows"].items())
    out.print("\ndataset  " + (f"revision {dataset['revision']} ({rows})" if dataset["revision"] is not None else "no revision yet"))
    out.print(f"store    {settings.store}")
    if stack is None:
        out.print("stack    not running; start it with `retune up`")
        return
    out.print(f"Airflow  {stack.airflow_url} (user {stack.user}, password in {stack.password_file})")
    out.print(f"MLflow   {without_password(stack.mlflow_url)}")
    for name, component in stack.components.items():
        if component["state"] != "running" or component["restarts"]:
            out.print(f"[yellow]{name} is {component['state']}, restarted {component['restarts']} time(s); see {component['log']}[/]")
