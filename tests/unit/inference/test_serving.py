"""What travels with a model version: pinned requirements, code that needs no more than they name, and a model that loads without Retune."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import tiny

import retune
from retune.inference.predictor import Predictor
from retune.inference.release import write_release
from retune.inference.requirements import PACKAGES, requirements

SOURCE = Path(retune.__file__).parent
TRAVELLING = ("__init__.py", "config.py", "errors.py", "policy.py", "text.py", "inference")
MODULES = [f for name in TRAVELLING for f in ([SOURCE / name] if name.endswith(".py") else sorted((SOURCE / name).rglob("*.py")))]
OTHER_NAMES = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "sklearn": "scikit-learn"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "retune" else (node.module,)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_travelling_code_imports_only_what_travels_and_what_is_required(path):
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "retune":
            assert rest, "import the module, not the package"
            assert rest[0] == "inference" or f"{rest[0]}.py" in TRAVELLING, name
        elif top not in sys.stdlib_module_names:
            assert OTHER_NAMES.get(top, top) in PACKAGES, name
            assert top != "mlflow" or path.name == "pyfunc_model.py"


def test_requirements_pin_what_is_installed_without_local_builds():
    found = dict(line.split("==") for line in requirements())
    assert found["transformers"] == version("transformers")
    assert found["torch"] == version("torch").split("+")[0]
    assert set(found) == set(PACKAGES)
    assert not any("+" in line for line in requirements())


def test_requirements_are_read_without_torch():
    code = "import sys; from retune.inference.requirements import requirements; requirements(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


PREDICT = """
import json, sys
from pathlib import Path
from retune.inference.predictor import Predictor
import retune
place = Path(sys.argv[1])
assert Path(retune.__file__).is_relative_to(place)
rows = json.loads((place / "rows.json").read_text())
print(Predictor.load(place / "release", [place]).predict(rows).to_json(orient="split", double_precision=15))
"""

PYFUNC = """
import importlib.util, json, sys
import mlflow, pandas
from pathlib import Path
place = Path(sys.argv[1])
assert importlib.util.find_spec("retune") is None
model = mlflow.pyfunc.load_model(str(place / "model"))
rows = pandas.DataFrame(json.loads((place / "rows.json").read_text()))[["text"]]
print(model.predict(rows).to_json(orient="split", double_precision=15))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with base model, release, rows and the travelling code; and the predictions to expect."""
    place = tmp_path_factory.mktemp("place")
    base = tiny.save_base(place / "base")
    prompt = tiny.make_prompt(base_model=tiny.reference(base))
    soft = tiny.make_soft_prompt(base)
    write_release(place / "release", prompt, tiny.tuned(soft), base, {})
    rows = tiny.make_rows(5)
    (place / "rows.json").write_text(json.dumps(rows))
    (place / "code/retune").mkdir(parents=True)
    for name in TRAVELLING:
        copy = shutil.copytree if (SOURCE / name).is_dir() else shutil.copyfile
        copy(SOURCE / name, place / "code/retune" / name)
    return place, Predictor(base, prompt, tiny.tuned(soft)).predict(rows)


def run(code, place, *absent, code_paths=(), **environ):
    """Runs code in a fresh interpreter without Retune, peft, airflow, dvc and whatever else is to be absent."""
    gone = {"retune", "peft", "airflow", "apache_airflow", "dvc", *absent}
    site = Path(tempfile.mkdtemp(dir=place))
    for entry in (e for p in sys.path if p.endswith("site-packages") for e in Path(p).iterdir()):
        name = entry.name.lstrip("_").split(".")[0].split("-")[0]
        if name not in gone and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    path = os.pathsep.join([str(site), *map(str, code_paths)])
    clean = {k: v for k, v in os.environ.items() if k != "RETUNE_BASE_MODELS"} | {"PYTHONPATH": path, "RETUNE_THREADS": "1"}
    return subprocess.run([sys.executable, "-S", "-c", code, str(place)], env=clean | environ, capture_output=True, text=True)


def table(out):
    assert out.returncode == 0, out.stderr
    return pd.DataFrame(**json.loads(out.stdout.splitlines()[-1]))


def test_a_release_is_served_by_the_travelling_code_alone(place):
    folder, expected = place
    out = run(PREDICT, folder, "mlflow", code_paths=[folder / "code"])
    pd.testing.assert_frame_equal(table(out), expected, check_dtype=False, rtol=1e-5)


@pytest.mark.integration
def test_a_model_version_loads_where_retune_is_not_installed(place):
    import mlflow

    folder, expected = place
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=str(SOURCE / "inference/pyfunc_model.py"),
        artifacts={"release": str(folder / "release")},
        code_paths=[str(folder / "code/retune")],
        pip_requirements=requirements(),
    )
    assert not list((folder / "model").rglob("*.pkl"))
    out = run(PYFUNC, folder, RETUNE_BASE_MODELS=str(folder))
    pd.testing.assert_frame_equal(table(out), expected, check_dtype=False, rtol=1e-5)


def test_without_its_base_model_a_version_says_which_and_where_to_put_it(place, monkeypatch):
    from types import SimpleNamespace

    from retune.errors import BadInputError
    from retune.inference.pyfunc_model import RetunePromptModel

    monkeypatch.setenv("RETUNE_BASE_MODELS", str(place[0] / "code"))
    context = SimpleNamespace(artifacts={"release": str(place[0] / "release")})
    with pytest.raises(BadInputError, match=r"no base model with sha256 [0-9a-f]{64}.*Set RETUNE_BASE_MODELS"):
        RetunePromptModel().load_context(context)
