"""docker-compose.yml as Compose reads it (compose_file)."""

import re
from pathlib import Path

import pytest
from checkouts import ROOT
from compose_file import ComposeError, interpolate, read_compose
from compose_stack import compose_variables


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A-${A}", "a-a"),
        ("$$A $${A}", "$A ${A}"),
        ("${NO:-b} ${EMPTY:-c} ${EMPTY-d} ${NO-e}", "b c  e"),
        ("${NO:-${A}!} ${A:+x} ${NO:+x}", "a! x "),
        ("redis://:${A}@redis:6379/0", "redis://:a@redis:6379/0"),
    ],
)
def test_variables_are_put_in_as_compose_does(text: str, value: str) -> None:
    assert interpolate(text, {"A": "a", "EMPTY": ""}) == value


def test_the_file_starts_nothing_without_its_secrets(tmp_path: Path) -> None:
    variables = compose_variables(tmp_path / ".env")
    wanted = set(re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text()))
    assert wanted <= set(variables)
    for name in wanted:
        without = {key: value for key, value in variables.items() if key != name}
        with pytest.raises(ComposeError, match=f"{name} is missing a value: .*make secrets"):
            read_compose(ROOT / "docker-compose.yml", without)


def test_only_the_two_web_pages_are_published(tmp_path: Path) -> None:
    services = read_compose(ROOT / "docker-compose.yml", compose_variables(tmp_path / ".env")).services
    published = {name: service.published for name, service in services.items() if service.published}
    assert set(published) == {"mlflow", "api-server"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
