"""# rollback

Makes an earlier release of a prompt the champion again. Nothing is retrained: the release is loaded and tried first, then the ledger
and MLflow's aliases name it.

Leave *Release* empty and the run asks, under *Required Actions*, with the choices of the ledger at that moment. The release that is left
is **barred**: no later run promotes it again, until `retune unbar`.
"""

from datetime import timedelta

from airflow.sdk import Param, dag, get_current_context
from retune_dags import DEFAULT_ARGS, MODEL_PLACE, PROMPTS, trigger_of
from retune_operators import ChooseRelease, retune_task


@dag(
    dag_id="rollback",
    schedule=None,
    catchup=False,
    default_args=DEFAULT_ARGS,
    dagrun_timeout=timedelta(hours=25),
    params={
        "prompt": Param(
            next(iter(PROMPTS), None), type="string", enum=list(PROMPTS), title="Prompt", description="Which champion to leave"
        ),
        "release": Param(
            "",
            type=["null", "string"],
            title="Release",
            description="`previous`, a version number or the beginning of a release id; empty: choose from the ledger",
        ),
        "reason": Param(type="string", minLength=3, title="Reason", description="Why; kept in the ledger"),
    },
    tags=["retune"],
    doc_md=__doc__,
)
def rollback():
    @retune_task(trigger_rule="none_failed", **MODEL_PLACE)
    def rollback(answer):
        from retune.tasks.rollback import chosen, rollback

        context = get_current_context()
        params = context["params"]
        target = chosen(params["prompt"], answer["chosen"]) if answer else params["release"]
        return rollback(params["prompt"], target, trigger_of(context), answer)

    choose = ChooseRelease(
        task_id="choose", subject="Roll back {{ params.prompt }} to which release?", response_timeout=timedelta(hours=24)
    )
    rollback(choose.output)


rollback()
