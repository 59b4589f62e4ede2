"""dvc.yaml names for each stage exactly the code that the stage imports: less, and a change would be missed; more, and it would cost."""

import ast
from pathlib import Path

import pytest
import yaml

from retune.config import RELEASED, Prompt

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text("utf-8"))["stages"]


def module_file(name: str) -> Path | None:
    """Source file of a retune module, None for anything else."""
    place = ROOT / "src" / Path(*name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def imported(path: Path) -> set[Path]:
    """Files of the package that a file imports, in functions too, and the packages on the way."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    files = set()
    for name in names:
        if name.split(".")[0] == "retune" and (file := module_file(name)):
            files.add(file)
            parts = name.split(".")
            files |= {f for i in range(1, len(parts)) if (f := module_file(".".join(parts[:i])))}
    return files


def closure(path: Path) -> set[Path]:
    seen, todo = set(), {path}
    while todo:
        file = todo.pop()
        seen.add(file)
        todo |= imported(file) - seen
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_exactly_the_code_it_imports(stage: str) -> None:
    deps = [d for d in STAGES[stage]["do"]["deps"] if d.startswith("src/")]
    needed = {f.relative_to(ROOT).as_posix() for f in closure(ROOT / f"src/retune/stages/{stage}.py")}
    covered = {f for f in needed if any(f == d or f.startswith(d + "/") for d in deps)}
    assert needed - covered == set(), "imported, but not a dependency in dvc.yaml"
    idle = {d for d in deps if not any(f == d or f.startswith(d + "/") for f in needed)}
    assert idle == set(), "a dependency in dvc.yaml that the stage does not import"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_names_fields_that_prompt_files_have(stage: str) -> None:
    fields = {field for entry in STAGES[stage]["do"].get("params", []) for names in entry.values() for field in names}
    assert fields <= set(Prompt.model_fields)


def test_a_release_is_made_of_the_parameters_of_stage_tune() -> None:
    (entry,) = STAGES["tune"]["do"]["params"]
    assert set(entry["artifacts/${item}/prompt.yaml"]) == set(RELEASED)


def test_params_name_every_prompt_file() -> None:
    named = yaml.safe_load((ROOT / "params.yaml").read_text("utf-8"))["prompts"]
    assert sorted(named) == sorted(p.stem for p in (ROOT / "prompts").glob("*.yaml") if not p.name.endswith(".checks.yaml"))
