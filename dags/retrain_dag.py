"""# retrain_<prompt>

Tunes a prompt's soft prompt on the newest dataset revision, and promotes it only if it is measurably better than the champion.

`resolve` pins revision and champion, or ends the run green when the ledger has decided on the same data, prompt and code before. `tune`
runs once per trial, `evaluate` once per release: the candidate, the champion and the template alone, on the same test rows. `decide` writes
verdict and reasons to the ledger and to MLflow. On HOLD or REJECT `promote` is **skipped** and the run is green: that is the gate at work.

Each task passes on lineage (a few kB), never data; a stage with unchanged code, data and parameters is restored on any worker.
"""

from datetime import timedelta

from airflow.sdk import Param, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowSkipException
from retune_dags import DEFAULT_ARGS, PROMPTS, schedule_of, triggered_by

PARAMS = {
    "overrides": Param({}, type="object", title="Overrides", description='Prompt fields to replace, such as {"tune.learning_rate": 0.01}'),
    "trials": Param(
        None, type=["null", "array"], title="Trials", description="List of overrides, one tuning run each; empty: the prompt file's"
    ),
    "force": Param(False, type="boolean", title="Force", description="Go through even if the same inputs were decided before"),
    "reason": Param("", type="string", title="Reason", description="Why; kept in MLflow and the ledger"),
}


def retrain(name: str):
    @dag(
        dag_id=f"retrain_{name}",
        schedule=schedule_of(PROMPTS[name]),
        catchup=False,
        max_active_runs=1,
        default_args=DEFAULT_ARGS,
        dagrun_timeout=timedelta(hours=24),
        params=PARAMS,
        tags=["retune", name],
        description=PROMPTS[name].description,
        doc_md=__doc__.replace("<prompt>", name),
    )
    def flow():
        @task.short_circuit
        def resolve():
            from retune.tasks import retrain
            from retune.tasks.context import Trigger

            context = get_current_context()
            run, params = context["dag_run"], context["params"]
            trigger = Trigger(
                run.run_id, run.run_type.value, triggered_by(context), params["overrides"], bool(params["force"]), params["reason"]
            )
            return retrain.resolve(name, trigger)

        @task
        def preprocess(run):
            from retune.tasks import retrain

            return retrain.preprocess(run)

        @task
        def plan(run):
            from retune.tasks import retrain

            return retrain.plan(run, get_current_context()["params"]["trials"])

        @task(pool="gpu", execution_timeout=timedelta(hours=12), map_index_template="{{ trial_name }}")
        def tune(run, trial):
            from retune.tasks import retrain

            get_current_context()["trial_name"] = trial["name"]
            return retrain.tune(run, trial)

        @task
        def select(run, tuned):
            from retune.tasks import retrain

            return retrain.select(run, list(tuned))

        @task(pool="gpu", execution_timeout=timedelta(hours=6), map_index_template="{{ role }}")
        def evaluate(run, contender):
            from retune.tasks import retrain

            get_current_context()["role"] = contender["role"]
            return retrain.evaluate(run, contender)

        @task
        def decide(run, evaluated):
            from retune.tasks import verdict

            return verdict.decide(run, list(evaluated))

        @task
        def promote(run, evaluated, decided):
            if decided["verdict"] != "PROMOTE":
                raise AirflowSkipException(f"{decided['verdict']}: the champion stays (ledger entry {decided['entry']})")
            from retune.tasks import verdict

            return verdict.promote(run, list(evaluated), decided)

        run = preprocess(resolve())
        tuned = tune.partial(run=run).expand(trial=plan(run))
        evaluated = evaluate.partial(run=run).expand(contender=select(run, tuned))
        promote(run, evaluated, decide(run, evaluated))

    return flow()


for prompt_name in PROMPTS:
    retrain(prompt_name)
