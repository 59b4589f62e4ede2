"""deploy/kubernetes against the Kubernetes schemas, the settings' own list, and what the documentation says of it. Needs no cluster."""

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy/kubernetes"
PODS = ("task", "gpu")
VERSIONS = ("1.31", "1.34", "1.37")
SET_BY_THE_POD = {"HOME", "TMPDIR", "AIRFLOW_HOME", "HF_HOME"}
"""Not settings of Retune."""


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text("utf-8"))
    return loaded


def pod(name: str) -> dict[str, Any]:
    return read(f"pods/{name}")


def check(manifest: dict[str, Any], version: str = VERSIONS[-1]) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["settings", *(f"pods/{name}" for name in PODS)])
def test_manifests_hold_to_the_schema(name: str, version: str) -> None:
    check(read(name), version)


def test_the_schema_refuses_a_field_that_is_spelled_wrong_and_a_value_of_another_type() -> None:
    wrong = pod("gpu")
    wrong["spec"]["toleration"] = wrong["spec"].pop("tolerations")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(wrong)
    with pytest.raises(kubernetes_validate.ValidationError):
        check({**read("settings"), "data": {"RETUNE_REQUIRE_CLEAN": 1}})


def fragments(values: Any) -> Iterator[dict[str, Any]]:
    """A pod for each section of the chart's values that holds parts of one."""
    if not isinstance(values, dict):
        return
    container = {"name": "base", **{key: values[key] for key in ("resources", "env") if key in values}}
    container |= {"volumeMounts": values["extraVolumeMounts"]} if "extraVolumeMounts" in values else {}
    contexts = values.get("securityContexts", {})
    container |= {"securityContext": contexts["containers"]} if "containers" in contexts else {}
    spec = {"securityContext": contexts["pod"]} if "pod" in contexts else {}
    for probe in ("livenessProbe", "startupProbe"):
        if "command" in values.get(probe, {}):
            fields = dict(values[probe])
            container[probe] = {"exec": {"command": fields.pop("command")}, **fields}
    for key, name in (("extraVolumes", "volumes"), ("extraInitContainers", "initContainers")):
        spec |= {name: values[key]} if key in values else {}
    if "terminationGracePeriodSeconds" in values:
        spec["terminationGracePeriodSeconds"] = values["terminationGracePeriodSeconds"]
    if len(container) > 1 or spec:
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "part"}, "spec": {**spec, "containers": [container]}}
    for value in values.values():
        yield from fragments(value)


@pytest.mark.parametrize(("name", "parts"), [("values", 7), ("values-celery", 1)])
def test_parts_of_pods_in_the_values_hold_to_the_schema(name: str, parts: int) -> None:
    """The chart's own schema is not at hand here; that of what it passes on to Kubernetes is."""
    found = list(fragments(read(name)))
    assert len(found) == parts
    for each in found:
        check(each)
        mounted = {mount["name"] for c in each["spec"]["containers"] for mount in c.get("volumeMounts", [])}
        assert mounted <= {volume["name"] for volume in each["spec"].get("volumes", [])}


def test_every_container_is_told_the_same_by_reference() -> None:
    told = yaml.safe_load(read("values")["extraEnvFrom"])
    assert told == [{"configMapRef": {"name": read("settings")["metadata"]["name"]}}]
    keys = [{"secretRef": {"name": name}} for name in ("retune-store", "retune-mlflow")]
    assert [pod(name)["spec"]["containers"][0]["envFrom"] for name in PODS] == [told + keys, told + keys]


def test_the_keys_of_the_store_and_of_mlflow_go_to_whoever_uses_them() -> None:
    """Tasks, and of the components those that write logs of tasks or show them."""
    values, celery = read("values"), read("values-celery")
    parts = {name: part for name, part in values.items() if isinstance(part, dict)}
    handed = {name: {each for each in names_of_secrets(part) if each.startswith("retune-")} for name, part in parts.items()}
    assert {name: names for name, names in handed.items() if names} == {"triggerer": {"retune-store"}, "apiServer": {"retune-store"}}
    assert set(names_of_secrets(celery["workers"])) == {"retune-store", "retune-mlflow"}
    guide = (ROOT / "docs/kubernetes.md").read_text("utf-8")
    for part in (values["triggerer"], values["apiServer"], celery["workers"]["celery"]):
        for each in part["env"]:
            if "valueFrom" in each:
                secret = each["valueFrom"]["secretKeyRef"]
                assert secret["key"] == each["name"]
                assert re.search(rf"create secret generic {secret['name']} .*--from-literal={secret['key']}=", guide)


@pytest.mark.parametrize("name", PODS)
def test_a_task_is_nobody_and_writes_only_to_volumes_with_a_limit(name: str) -> None:
    spec = pod(name)["spec"]
    (container,) = spec["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    limits = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(limits)
    folders = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    values = {each["name"]: each["value"] for each in container["env"]}
    assert {name for name, value in values.items() if any(Path(value).is_relative_to(f) for f in folders)} == {
        *SET_BY_THE_POD,
        "RETUNE_HOME",
    }


def test_the_gpu_pod_is_the_other_one_with_a_gpu() -> None:
    task, gpu = pod("task")["spec"], pod("gpu")["spec"]
    assert gpu.pop("tolerations") == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert gpu["terminationGracePeriodSeconds"] > task["terminationGracePeriodSeconds"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in gpu["containers"][0]["volumeMounts"]
    assert any(v["name"] == "shared-memory" and v["emptyDir"]["medium"] == "Memory" for v in gpu["volumes"])
    (container,) = gpu["containers"]
    container["env"] = [each for each in container["env"] if each["name"] != "RETUNE_PROCESSES"]
    container["volumeMounts"] = [each for each in container["volumeMounts"] if each["name"] != "shared-memory"]
    for each in (task, gpu):
        del each["terminationGracePeriodSeconds"], each["volumes"], each["containers"][0]["resources"]
    assert gpu == task


def test_the_templates_that_are_named_are_where_the_scheduler_reads_them() -> None:
    values, settings = read("values"), read("settings")["data"]
    (mount,), (volume,) = values["scheduler"]["extraVolumeMounts"], values["scheduler"]["extraVolumes"]
    named = [settings["RETUNE_GPU_POD_TEMPLATE"], values["config"]["kubernetes_executor"]["pod_template_file"]]
    assert named == [f"{mount['mountPath']}/{name}.yaml" for name in ("gpu", "task")]
    guide = (ROOT / "docs/kubernetes.md").read_text("utf-8")
    assert f"create configmap {volume['configMap']['name']} --from-file=deploy/kubernetes/pods" in guide


def names_of_secrets(value: Any) -> Iterator[str]:
    """Of the Secrets that a manifest or the chart's values refer to."""
    if isinstance(value, list):
        for each in value:
            yield from names_of_secrets(each)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in ("secretRef", "secretKeyRef"):
                yield inner["name"]
            elif key.lower().endswith("secretname"):
                yield inner
            else:
                yield from names_of_secrets(yaml.safe_load(inner) if key == "extraEnvFrom" else inner)


def test_secrets_are_named_never_written_and_the_guide_makes_each_of_them() -> None:
    files = [read(name) for name in ("values", "values-celery", "settings", *(f"pods/{name}" for name in PODS))]
    guide = (ROOT / "docs/kubernetes.md").read_text("utf-8")
    assert {name for file in files for name in names_of_secrets(file)} == set(re.findall(r"create secret generic ([\w-]+)", guide))
    text = "".join(path.read_text("utf-8") for path in DEPLOY.rglob("*.yaml"))
    assert not re.search(r"^ *\w*(PASSWORD|SECRET_ACCESS_KEY|ACCESS_KEY_ID|FERNET_KEY|JWT_SECRET|SQL_ALCHEMY_CONN): ", text, re.MULTILINE)
    assert not re.search(r"://[^/\s:]+:[^/\s@]+@", text)


def test_the_settings_are_such_as_retune_and_airflow_have() -> None:
    """A name with a slip of the pen would be told to everybody and read by nobody."""
    spec = find_spec("airflow")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    known = yaml.safe_load((Path(spec.submodule_search_locations[0]) / "config_templates/config.yml").read_text("utf-8"))
    listed = set(re.findall(r"^# ([A-Z_0-9]+)=", (ROOT / ".env.example").read_text("utf-8"), re.MULTILINE))
    own = {each["name"] for name in PODS for each in pod(name)["spec"]["containers"][0]["env"]} - SET_BY_THE_POD
    for name in {*read("settings")["data"], *own}:
        if match := re.fullmatch(r"AIRFLOW__([A-Z_]+?)__([A-Z_]+)", name):
            section, key = (part.lower() for part in match.groups())
            assert key in known[section]["options"], name
        else:
            assert name.startswith("AIRFLOW_CONN_") or name in listed, name


def test_the_probes_ask_for_jobs_that_airflow_has() -> None:
    spec = find_spec("airflow")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    jobs = {
        node.value.value
        for file in (Path(spec.submodule_search_locations[0]) / "jobs").glob("*_runner.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and getattr(node.targets[0], "id", "") == "job_type"
    }
    values = read("values")
    asked = [values[part]["livenessProbe"]["command"] for part in ("scheduler", "dagProcessor", "triggerer")]
    asked.append(values["scheduler"]["startupProbe"]["command"])
    assert {command[command.index("--job-type") + 1] for command in asked} <= jobs


def test_versions_are_those_of_the_project() -> None:
    values, lock = read("values"), (ROOT / "requirements.lock").read_text("utf-8")
    assert f"apache-airflow=={values['airflowVersion']} " in lock
    assert read("values-celery")["defaultAirflowRepository"] == values["config"]["kubernetes_executor"]["worker_container_repository"]


def test_no_image_has_a_tag_that_stays_and_the_guide_sets_both() -> None:
    """A node that has an image of a name and tag runs it after an upgrade, too."""
    values, guide = read("values"), (ROOT / "docs/kubernetes.md").read_text("utf-8")
    tags = {"defaultAirflowTag": values["defaultAirflowTag"]}
    tags["config.kubernetes_executor.worker_container_tag"] = values["config"]["kubernetes_executor"]["worker_container_tag"]
    assert set(tags.values()) == {"set-at-install"}
    install = guide.split("helm upgrade --install", 1)[1].split("```", 1)[0]
    assert dict.fromkeys(re.findall(r'--set-string ([\w.]+)="\$COMMIT"', install)) == dict.fromkeys(tags)
