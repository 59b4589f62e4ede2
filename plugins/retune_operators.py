"""What Retune adds to Airflow's operators: links from a task to MLflow, a person's approval, and a choice of releases.

    @retune_task
    def preprocess(run): ...

A task that takes or returns a dict with `links` (link name -> address) shows them as buttons in Airflow's UI.
"""

from collections.abc import Callable
from typing import Any

from airflow.providers.standard.decorators.python import _PythonDecoratedOperator
from airflow.providers.standard.decorators.short_circuit import _ShortCircuitDecoratedOperator
from airflow.providers.standard.operators.hitl import ApprovalOperator, HITLOperator
from airflow.sdk import BaseOperatorLink, Context, Param
from airflow.sdk.bases.decorator import task_decorator_factory
from airflow.sdk.exceptions import AirflowSkipException

__all__ = ["ApprovePromotion", "ChooseRelease", "Links", "answer_of", "retune_short_circuit", "retune_task"]


class _Link(BaseOperatorLink):
    """A button whose address the task itself names; Airflow keeps it when the task ends, failed or not."""

    def get_link(self, operator: Any, *, ti_key: Any) -> str:  # noqa: ARG002  Airflow's signature
        return str(getattr(operator, "found_links", {}).get(self.name, ""))


class MlflowRunLink(_Link):
    name = "MLflow run"


class ReportLink(_Link):
    name = "Report"


class ReleaseLink(_Link):
    name = "Release"


class Links:
    """Operator with buttons to what its task is about: those of its arguments, then those of its result."""

    operator_extra_links = (MlflowRunLink(), ReportLink(), ReleaseLink())

    def execute(self, context: Context) -> Any:
        given = [*getattr(self, "op_args", ()), *getattr(self, "op_kwargs", {}).values()]
        self.found_links: dict[str, str] = {}
        for value in given:
            self._take(value)
        result = super().execute(context)  # type: ignore[misc]
        self._take(result)
        return result

    def _take(self, value: Any) -> None:
        if isinstance(value, dict) and isinstance(value.get("links"), dict):
            self.found_links |= value["links"]


class RetuneTask(Links, _PythonDecoratedOperator):
    custom_operator_name = "@retune_task"


class RetuneShortCircuit(Links, _ShortCircuitDecoratedOperator):
    custom_operator_name = "@retune_short_circuit"


def retune_task(function: Callable[..., Any] | None = None, **arguments: Any) -> Any:
    """`@task` with links."""
    return task_decorator_factory(function, decorated_operator_class=RetuneTask, **arguments)


def retune_short_circuit(function: Callable[..., Any] | None = None, **arguments: Any) -> Any:
    """`@task.short_circuit` with links."""
    return task_decorator_factory(function, decorated_operator_class=RetuneShortCircuit, **arguments)


COMMENT = Param("", type=["null", "string"], title="Comment", description="Kept in the ledger", source="task")


def answer_of(event: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Who answered what and when, for the ledger; nobody (`by` is None) where the time ran out."""
    user = answer["responded_by_user"] or {}
    return {
        "chosen": answer["chosen_options"][0],
        "by": None if event.get("timedout") else user.get("name") or user.get("id"),
        "at": answer["responded_at"].isoformat(),
        "comment": answer["params_input"].get("comment") or "",
    }


class ApprovePromotion(ApprovalOperator):
    """Airflow's approval before a promotion: skipped where none is asked for, `Reject` when nobody answers in time.

    Unlike Airflow's it skips nothing after it: `promote` is handed the answer, and enters a refusal in the ledger.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(defaults=self.REJECT, **{**arguments, "params": {"comment": COMMENT}})

    def execute(self, context: Context) -> Any:
        decided = context["ti"].xcom_pull(task_ids="decide")
        if not decided["ask"]:
            raise AirflowSkipException("nothing to approve, or nobody to be asked")
        self.body = f"{decided['summary']}\n[Report in MLflow]({decided['links']['Report']})"
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        return answer_of(event, HITLOperator.execute_complete(self, context, event))


class ChooseRelease(HITLOperator):
    """Asks which release to go back to, unless the form says so. The choices are the ledger's at the moment of asking."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(options=["(from the ledger)"], **{**arguments, "params": {"comment": COMMENT}})

    def execute(self, context: Context) -> Any:
        if context["params"]["release"]:
            raise AirflowSkipException(f"the form names release {context['params']['release']}")
        self._read_choices(context)
        return super().execute(context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> dict[str, Any]:
        self._read_choices(context)
        return answer_of(event, super().execute_complete(context, event))

    def _read_choices(self, context: Context) -> None:
        from retune.tasks.rollback import choices, choices_markdown

        found = choices(context["params"]["prompt"])
        self.options, self.body = list(found), choices_markdown(found)
