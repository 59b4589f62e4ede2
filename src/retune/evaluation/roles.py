"""The parts that releases play in a comparison, in the order in which tables and figures show them."""

__all__ = ["BASELINE", "CANDIDATE", "CHAMPION", "FEW_SHOT", "ROLE_TITLES"]

BASELINE = "baseline"
FEW_SHOT = "few_shot"
CHAMPION = "champion"
CANDIDATE = "candidate"

ROLE_TITLES = {BASELINE: "template alone", FEW_SHOT: "few-shot", CHAMPION: "champion", CANDIDATE: "candidate"}
"""Role -> its heading for a person."""
