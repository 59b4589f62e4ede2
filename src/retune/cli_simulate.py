"""`retune simulate-gate`: the gate on releases whose true difference is known."""

from typing import TYPE_CHECKING, Annotated

import typer

from retune.cli_output import AsJson, console, emit
from retune.errors import RetuneError

if TYPE_CHECKING:
    from retune.evaluation.simulation import FalsePromotions, Power

__all__ = ["simulate_gate"]


def simulate_gate(
    comparisons: Annotated[int, typer.Option("--comparisons", min=100, help="Comparisons (and years) of each scenario.")] = 2000,
    confidence: Annotated[float, typer.Option("--confidence", min=0.51, max=0.999, help="promote.confidence of the policy.")] = 0.95,
    looks: Annotated[int, typer.Option("--looks", min=1, help="promote.looks_per_test_split of the policy.")] = 52,
    seed: Annotated[int, typer.Option("--seed", help="Another seed, other draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Count false promotions among equal releases, and what gains the gate finds at which test size."""
    from retune.evaluation import simulation
    from retune.policy import Policy

    policy = Policy(metric="accuracy", confidence=confidence, looks_per_test_split=looks)
    progress = console(stderr=True)
    found = []
    for each in simulation.simulate(comparisons, policy, seed):
        progress.print(f"{each.scenario}: {each.false_promotions} of {each.comparisons} promoted", markup=False)
        found.append(each)
    table = list(simulation.power(max(100, comparisons // 4), policy, seed))
    if as_json:
        emit({"false_promotions": [each.to_json() for each in found], "power": [each.to_json() for each in table]})
    else:
        _show(found, table, confidence, looks)
    if broken := [each.scenario for each in found if not each.kept]:
        raise RetuneError(
            f"more false promotions than 1 - confidence allows: {'; '.join(broken)}; try another --seed (a few in a hundred runs of a "
            "sound gate look so), and if it stays, trust no promotion"
        )


def _show(found: "list[FalsePromotions]", table: "list[Power]", confidence: float, looks: int) -> None:
    from rich.table import Table

    out = console()
    equal = Table("equal releases", "promoted", "rate", "99 % interval", "allowed", box=None, pad_edge=False)
    for each in found:
        promoted, interval = f"{each.false_promotions} of {each.comparisons}", f"{each.lower_bound:.4f} to {each.upper_bound:.4f}"
        equal.add_row(each.scenario, promoted, f"{each.false_promotion_rate:.4f}", interval, f"{1 - confidence:g}")
    out.print(equal)
    gains = list(dict.fromkeys(each.gain for each in table))
    better = Table("test rows", *(f"gain {gain:g}" for gain in gains), box=None, pad_edge=False)
    for rows in dict.fromkeys(each.rows for each in table):
        better.add_row(str(rows), *(f"{each.power:.2f} ({each.closed_form:.2f})" for each in table if each.rows == rows))
    out.print()
    out.print(better)
    out.print(
        f"share of the comparisons that promote a release better by so much in accuracy, as one of {looks} looks at a test split; "
        "in brackets McNemar's test in closed form",
        markup=False,
    )
