"""The parts that releases play in a comparison, in the order in which tables and figures show them."""

__all__ = ["BASELINE", "CANDIDATE", "CHAMPION", "ROLE_TITLES"]

BASELINE = "baseline"
CHAMPION = "champion"
CANDIDATE = "candidate"

ROLE_TITLES = {BASELINE: "template alone", CHAMPION: "champion", CANDIDATE: "candidate"}
"""Role -> its heading for a person."""
