"""What Retune's users do in their browser, in headless Chromium on the stack that `make demo` leaves. The tests run in order.

Screenshots are written to the folder RETUNE_SCREENSHOTS, or to pytest's temporary folder.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import yaml
from checkouts import Demonstrated, environment_of, run
from playwright.sync_api import Page, expect, sync_playwright

from retune.ledger import Entry, Ledger, standing
from retune.local.airflow_api import FINISHED, Airflow
from retune.store import open_store

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
PROMPT = "ticket_priority"
DAG = f"retrain_{PROMPT}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("RETUNE_SCREENSHOTS")
TASK_WITHIN = 900_000
"""Milliseconds in which a waiting page must show the end of a task, or of a run."""
AS_A_PERSON = 15_000
"""Milliseconds before a question is answered. Airflow 3.3 takes an answer within a pass of its scheduler (seconds on a busy machine) for a
fault: it queues the task before it has read that its first process ended, marks it for retry, and asks again."""


@pytest.fixture(scope="module")
def project(demonstrated: Demonstrated) -> Iterator[Path]:
    if CHROMIUM is None:
        if os.environ.get("RETUNE_ALL_TIERS"):
            pytest.fail("no Chromium: install it (apt-get install chromium)")
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with environment_of(demonstrated.project):
        yield demonstrated.project


@pytest.fixture(scope="module")
def stack(project: Path) -> Iterator[dict[str, Any]]:
    run(project, "retune.cli", "up")
    yield json.loads((project / ".retune/stack.json").read_text("utf-8"))
    run(project, "retune.cli", "down")


@pytest.fixture(scope="module")
def password(stack: dict[str, Any]) -> str:
    return str(json.loads(Path(stack["password_file"]).read_text("utf-8"))[stack["user"]])


@pytest.fixture(scope="module")
def airflow(stack: dict[str, Any], password: str) -> Airflow:
    return Airflow(stack["airflow_url"], stack["user"], password)


@pytest.fixture(scope="module")
def page(stack: dict[str, Any], password: str) -> Iterator[Page]:
    """A browser that has logged in through Airflow's login page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(stack["airflow_url"])
        page.fill("input[name=username]", stack["user"])
        page.fill("input[name=password]", password)
        page.click("button[type=submit]")
        expect(page.get_by_text("Dags").first).to_be_visible()
        yield page
        browser.close()


@pytest.fixture(scope="module")
def shoot(page: Page, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    folder = Path(SCREENSHOTS) if SCREENSHOTS else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)

    def take(name: str) -> None:
        page.wait_for_timeout(1500)  # charts draw themselves after their data have come
        page.screenshot(path=str(folder / f"{name}.png"))

    return take


def entries(project: Path) -> list[Entry]:
    return Ledger(open_store(str(project / ".retune/store")), PROMPT).entries()


def champion(project: Path) -> dict[str, Any]:
    found = standing(entries(project)).champion
    assert found is not None
    return found


def open_form(page: Page, stack: dict[str, Any], dag: str) -> Any:
    page.goto(f"{stack['airflow_url']}/dags/{dag}")
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog")
    expect(form.locator("[name='element_reason']")).to_be_visible()
    return form


def submit(page: Page, form: Any) -> str:
    """The address of the run's page, to which Airflow leads."""
    form.get_by_role("button", name="Trigger").last.click()
    page.wait_for_url(re.compile(r"/runs/"))
    return page.url.split("?")[0]


def waits_for(airflow: Airflow, dag: str, run_id: str, task: str, state: str, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while {t.task: t.state for t in airflow.tasks(dag, run_id)}.get(task) != state:
        assert airflow.run(dag, run_id)["state"] not in FINISHED, f"{dag} {run_id} ended before {task} was {state}"
        assert time.monotonic() < deadline, f"{task} of {run_id} was not {state} within {seconds} s"
        time.sleep(2)


def finished(airflow: Airflow, dag: str, run_id: str, seconds: float = 600) -> str:
    deadline = time.monotonic() + seconds
    while (state := str(airflow.run(dag, run_id)["state"])) not in FINISHED:
        assert time.monotonic() < deadline, f"{dag} {run_id} is {state} after {seconds} s"
        time.sleep(1)
    return state


def answer_in_a_fresh_process(project: Path, stack: dict[str, Any], alias: str = "champion") -> dict[str, Any]:
    done = run(project, "retune.cli", "predict", PROMPT, "--text", "It must be solved today!", "--alias", alias, "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_rolling_back_by_form_offers_the_ledgers_releases(
    page: Page, stack: dict[str, Any], project: Path, shoot: Callable[[str], None], airflow: Airflow
) -> None:
    left = champion(project)
    form = open_form(page, stack, "rollback")
    shoot("01-rollback-form-needs-a-reason")
    expect(form.get_by_text("This field is required")).to_be_visible()
    form.locator("[name='element_reason']").fill("answers are worse since noon")
    url = submit(page, form)
    expect(page.get_by_text("Awaiting Input")).to_be_visible(timeout=TASK_WITHIN)
    page.goto(f"{url}/tasks/choose/required_actions")
    expect(page.get_by_role("button", name=re.compile("version 1 "))).to_be_visible()
    expect(page.get_by_text("the template alone")).to_be_visible()
    target = page.get_by_role("button", name=re.compile("version 2 "))
    shoot("02-rollback-choices")
    page.locator("[name='element_comment']").fill("the one before")
    page.wait_for_timeout(AS_A_PERSON)
    target.click()
    page.goto(f"{url}/tasks/rollback")
    expect(page.get_by_text("Success").first).to_be_visible(timeout=TASK_WITHIN)
    shoot("03-rolled-back")
    entry = entries(project)[-1]
    assert (entry.kind, entry.by, entry.reason) == ("rollback", "admin", "answers are worse since noon; the one before")
    assert entry.body["from"] == left["release"]
    assert champion(project)["version"] == "2"
    assert standing(entries(project)).barred == {left["release"]}
    assert answer_in_a_fresh_process(project, stack)["predictions"][0]["prediction"] in ("low", "medium", "high")


def test_a_changed_setting_goes_from_the_form_to_an_approved_promotion(
    page: Page, stack: dict[str, Any], project: Path, shoot: Callable[[str], None], airflow: Airflow
) -> None:
    form = open_form(page, stack, DAG)
    form.locator("[name='element_reason']").fill("another seed")
    for switch in ("approval", "patch"):
        form.locator(f"label:has(input[name='element_{switch}'])").click()
    form.get_by_role("button", name="Tuning").click()
    form.locator("[name='element_tune.seed']").fill("21")
    shoot("04-retrain-form-tuning")
    form.get_by_role("button", name="More").click()
    shoot("05-retrain-form-more")
    url = submit(page, form)
    shoot("06-running")
    page.goto("about:blank")  # a page that draws the run anew every few seconds would take the processor from it
    waits_for(airflow, DAG, unquote(url.rpartition("/")[2]), "approve", "awaiting_input")
    page.goto(f"{url}/tasks/approve/required_actions")
    expect(page.get_by_text(f"{PROMPT}: PROMOTE")).to_be_visible()
    shoot("07-approve")
    page.locator("[name='element_comment']").fill("reads well")
    page.wait_for_timeout(AS_A_PERSON)
    page.get_by_role("button", name="Approve").click()
    page.goto(f"{url}/tasks/promote")
    expect(page.get_by_text("Success").first).to_be_visible(timeout=TASK_WITHIN)
    shoot("08-promoted")
    entry = entries(project)[-1]
    assert (entry.kind, entry.by) == ("promote", "admin")
    assert entry.body["triggered"]["reason"] == "another seed"
    assert entry.body["decision"]["reasons"][-1] == "Approved by admin: reads well"
    assert entry.body["lineage"]["overrides"] == {"tune.seed": 21}


def test_links_lead_from_a_task_to_mlflow_and_back(page: Page, stack: dict[str, Any], project: Path, shoot: Callable[[str], None]) -> None:
    url = f"{stack['airflow_url']}/dags/{DAG}/runs/{quote(entries(project)[-1].body['dag_run_id'], safe='')}"
    page.goto(f"{url}/tasks/promote/details")
    links = {name: page.get_by_role("link", name=name).get_attribute("href") for name in ("MLflow run", "Report", "Release")}
    shoot("09-links")
    page.goto(str(links["MLflow run"]))
    expect(page.get_by_text(re.compile("seed=21 · revision")).first).to_be_visible()
    shoot("10-mlflow-run")
    assert page.get_by_role("link", name=re.compile("DAG run manual__")).first.get_attribute("href") == url
    page.goto(str(links["Report"]))
    report = page.frame_locator("iframe.mlflow-html-iframe")
    expect(report.get_by_role("heading", name=f"{PROMPT}: PROMOTE")).to_be_visible(timeout=60_000)
    shoot("11-mlflow-report")
    page.goto(str(links["Release"]))
    expect(page.get_by_text("Metrics on the test split")).to_be_visible()
    shoot("12-mlflow-release")


def test_the_patch_of_that_run_applies_to_the_checkout(project: Path, stack: dict[str, Any], tmp_path: Path) -> None:
    from mlflow import MlflowClient

    run_id = entries(project)[-1].body["mlflow_run_id"]
    patch = MlflowClient(tracking_uri=stack["mlflow_url"]).download_artifacts(run_id, "patch/retune.patch", str(tmp_path))
    subprocess.run(["git", "apply", "--check", patch], cwd=project, check=True)
    stat = subprocess.run(["git", "apply", "--stat", patch], cwd=project, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in stat.splitlines()[:-1]] == ["dvc.lock", f"prompts/{PROMPT}.yaml"], (
        "data.dvc is the one that the checkout has"
    )


def test_two_runs_are_compared_in_mlflow(page: Page, stack: dict[str, Any], project: Path, shoot: Callable[[str], None]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=stack["mlflow_url"])
    experiment = client.get_experiment_by_name(PROMPT).experiment_id
    page.goto(f"{stack['mlflow_url']}/#/experiments/{experiment}/runs")
    expect(page.get_by_text(re.compile("seed=21 · revision")).first).to_be_visible()
    shoot("13-mlflow-runs")
    judged = [e.body["mlflow_run_id"] for e in entries(project) if "decision" in e.body][-2:]
    runs, experiments = quote(json.dumps(judged)), quote(json.dumps([experiment]))
    page.goto(f"{stack['mlflow_url']}/#/compare-runs?runs={runs}&experiments={experiments}")
    expect(page.get_by_text("tune.seed").first).to_be_visible()
    shoot("14-mlflow-compare")
    both = [client.get_run(run_id) for run_id in judged]
    changed = {name for name in both[0].data.params if both[0].data.params[name] != both[1].data.params.get(name)}
    assert "tune.seed" in changed, "what changed"
    assert {"macro_f1", "champion_macro_f1", "gain", "low", "high"} <= both[0].data.metrics.keys() & both[1].data.metrics.keys(), (
        "did it help"
    )


def test_a_wrong_value_is_answered_with_what_would_be_right(airflow: Airflow) -> None:
    from retune.errors import RetuneError

    for number, (conf, message) in enumerate(
        [({"tune.learning_rate": -1}, "minimum"), ({"tune.init": "zeros"}, "sampled_vocabulary"), ({"tune.epochs": "many"}, "integer")]
    ):
        with pytest.raises(RetuneError, match=message):
            airflow.trigger(DAG, f"wrong_{number}", conf)


def test_a_cron_schedule_starts_a_run_by_itself(project: Path, airflow: Airflow) -> None:
    """And it ends green after its first task, since nothing is new."""
    path = project / f"prompts/{PROMPT}.yaml"
    text = path.read_text("utf-8")
    prompt = yaml.safe_load(text)
    decided = len(entries(project))
    before = {r["dag_run_id"] for r in airflow._call(f"dags/{DAG}/dagRuns?limit=100")["dag_runs"]}
    path.write_text(yaml.safe_dump({**prompt, "schedule": {**prompt["schedule"], "cron": "* * * * *"}}, sort_keys=False), "utf-8")
    try:
        deadline = time.monotonic() + 240
        while True:
            runs = airflow._call(f"dags/{DAG}/dagRuns?limit=100&run_type=scheduled")["dag_runs"]
            if new := [r for r in runs if r["dag_run_id"] not in before]:
                break
            assert time.monotonic() < deadline, "no scheduled run within 240 s of a schedule of every minute"
            time.sleep(2)
    finally:
        path.write_text(text, "utf-8")
    assert finished(airflow, DAG, new[0]["dag_run_id"]) == "success"
    states = {t.task: t.state for t in airflow.tasks(DAG, new[0]["dag_run_id"])}
    assert states.pop("resolve") == "success"
    assert set(states.values()) == {"skipped"}
    assert len(entries(project)) == decided
    (resolve,) = [t for t in airflow.tasks(DAG, new[0]["dag_run_id"]) if t.task == "resolve"]
    assert any("nothing new: run " in line for line in airflow.log_lines(DAG, new[0]["dag_run_id"], resolve))


def test_two_revisions_in_quick_succession_lose_nothing(project: Path, airflow: Airflow) -> None:
    """The second lands while the run of the first is at work; the last verdict is on all of the data."""
    path = project / f"prompts/{PROMPT}.yaml"
    prompt = yaml.safe_load(path.read_text("utf-8"))
    quick = {
        **prompt,
        "trials": [{}],
        "tune": {**prompt["tune"], "epochs": 1},
        "evaluate": {"few_shot": 0, "probes": {"rows": 0}},
        "schedule": {"on_new_data": True, "min_new_rows": 0},
    }
    path.write_text(yaml.safe_dump(quick, sort_keys=False), "utf-8")
    time.sleep(35)  # until Airflow has read the file again
    barred = standing(entries(project)).barred
    files = sorted((project / f"examples/batches/{PROMPT}/3").iterdir())
    assert len(files) == 2
    for file in files:
        run(project, "retune.cli", "land", PROMPT, str(file))
        run(project, "retune.cli", "run", "ingest")
    dataset = Ledger(open_store(str(project / ".retune/store")), "dataset").entries()
    deadline = time.monotonic() + 900
    while entries(project)[-1].body.get("dataset_revision") != dataset[-1].n:
        assert time.monotonic() < deadline, f"revision {dataset[-1].n} was never decided on"
        time.sleep(2)
    last = entries(project)[-1]
    assert last.body["rows"] == dataset[-1].body["rows"][PROMPT]
    assert last.body["triggered"]["run_type"] == "asset_triggered"
    assert barred
    assert champion(project)["release"] not in barred, "new data do not bring the barred release back"


def test_the_command_rolls_back_and_a_fresh_process_answers_with_the_earlier_release(project: Path, stack: dict[str, Any]) -> None:
    begun = time.monotonic()
    done = json.loads(run(project, "retune.cli", "rollback", PROMPT, "--to", "1", "--reason", "to the template", "--json").stdout)
    commanded = time.monotonic()
    program = f"import mlflow; print(mlflow.pyfunc.load_model('models:/{PROMPT}@champion').metadata.model_uuid)"
    environ = {**os.environ, "MLFLOW_TRACKING_URI": stack["mlflow_url"], "RETUNE_BASE_MODELS": str(project / "examples")}
    loaded = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=300, check=True)
    print(
        f"rollback {commanded - begun:.1f} s, a fresh process loads the champion in {time.monotonic() - commanded:.1f} s: {loaded.stdout}"
    )
    assert done["version"] == "1"
    assert champion(project)["version"] == "1"
    assert entries(project)[-1].kind == "rollback"
