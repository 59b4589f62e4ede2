"""# retrain_<prompt>

Tunes a prompt's soft prompt on the newest dataset revision, and promotes it only if it is measurably better than the champion.

`resolve` pins revision and champion, or ends the run green when the ledger has decided on the same data, prompt and code before. `tune`
runs once per trial and once for the few-shot baseline, `evaluate` once per release: the candidate, the champion, the template alone and
that baseline, on the same test rows. `measure` times candidate and champion side by side and runs the prompt's checks
(`prompts/<prompt>.checks.yaml`) on the candidate. `decide` writes verdict and reasons to the ledger and to MLflow. On HOLD or REJECT
`promote` is **skipped** and the run is green: that is the gate at work.

`approve` waits for a person where the prompt file or the form asks for one: answer under *Required Actions*. A refusal, or no answer in
time, is a HOLD.

Each task passes on lineage (a few kB), never data; a stage with unchanged code, data and parameters is restored on any worker.
"""

from datetime import timedelta

from airflow.sdk import dag, get_current_context
from airflow.sdk.exceptions import AirflowSkipException
from retune_dags import DEFAULT_ARGS, MODEL_PLACE, MODEL_WORK, PROMPTS, RETRAIN, schedule_of, trigger_of
from retune_forms import overrides_of, retrain_form
from retune_operators import ApprovePromotion, retune_short_circuit, retune_task


def retrain(name: str):
    policy = PROMPTS[name].promote

    @dag(
        dag_id=f"{RETRAIN}{name}",
        schedule=schedule_of(PROMPTS[name]),
        catchup=False,
        max_active_runs=1,
        default_args={**DEFAULT_ARGS, "owner": PROMPTS[name].owner or "retune"},
        dagrun_timeout=timedelta(hours=24 + policy.approval_hours),
        params=retrain_form(PROMPTS[name]),
        tags=["retune", name],
        description=PROMPTS[name].description,
        doc_md=__doc__.replace("<prompt>", name),
    )
    def flow():
        @retune_short_circuit
        def resolve():
            from retune.tasks.resolve import resolve

            context = get_current_context()
            params = context["params"]
            wanted = {"overrides": overrides_of(params), **{key: bool(params[key]) for key in ("force", "approval", "patch")}}
            return resolve(name, trigger_of(context), **wanted)

        @retune_task
        def preprocess(run):
            from retune.tasks import retrain

            return retrain.preprocess(run)

        @retune_task
        def plan(run):
            from retune.tasks import retrain

            return retrain.plan(run, get_current_context()["params"]["trials"])

        @retune_task(**MODEL_WORK, execution_timeout=timedelta(hours=12), map_index_template="{{ trial_name }}")
        def tune(run, trial):
            from retune.tasks import retrain

            get_current_context()["trial_name"] = trial["name"]
            return retrain.tune(run, trial)

        @retune_task
        def select(run, tuned):
            from retune.tasks import retrain

            return retrain.select(run, list(tuned))

        @retune_task(**MODEL_WORK, execution_timeout=timedelta(hours=6), map_index_template="{{ role }}")
        def evaluate(run, contender):
            from retune.tasks import retrain

            get_current_context()["role"] = contender["role"]
            return retrain.evaluate(run, contender)

        @retune_task(**MODEL_WORK, execution_timeout=timedelta(hours=2))
        def measure(run, evaluated):
            from retune.tasks.measure import measure

            return measure(run, list(evaluated))

        @retune_task
        def decide(run, evaluated, measured):
            from retune.tasks import verdict

            return verdict.decide(run, list(evaluated), measured)

        @retune_task(trigger_rule="none_failed", **MODEL_PLACE)
        def promote(run, evaluated, measured, decided, answer):
            if decided["verdict"] != "PROMOTE":
                raise AirflowSkipException(f"{decided['verdict']}: the champion stays (ledger entry {decided['entry']})")
            from retune.tasks import verdict

            promoted = verdict.promote(run, list(evaluated), measured, decided, answer)
            if promoted["verdict"] != "PROMOTE":
                raise AirflowSkipException(f"{promoted['verdict']}: {promoted['reason']} (ledger entry {promoted['entry']})")
            return promoted

        run = preprocess(resolve())
        tuned = tune.partial(run=run).expand(trial=plan(run))
        evaluated = evaluate.partial(run=run).expand(contender=select(run, tuned))
        measured = measure(run, evaluated)
        decided = decide(run, evaluated, measured)
        approve = ApprovePromotion(
            task_id="approve",
            subject=f"Promote a new release of {name}?",
            response_timeout=timedelta(hours=policy.approval_hours),
        )
        decided >> approve
        promote(run, evaluated, measured, decided, approve.output)

    return flow()


for prompt_name in PROMPTS:
    retrain(prompt_name)
