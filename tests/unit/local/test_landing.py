"""Files into a landing zone."""

import pytest

from retune.config import Prompt
from retune.errors import BadInputError
from retune.local.landing import land


@pytest.fixture
def prompt() -> Prompt:
    return Prompt.model_validate(
        {
            "name": "p",
            "task": "generation",
            "base_model": {"path": "m", "sha256": "0" * 64},
            "source": "zone/p",
            "template": "{text}",
            "target": "answer",
        }
    )


def file(folder, name: str, text: str):
    path = folder / "outbox" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def states(landed) -> list[str]:
    return [item["state"] for item in landed]


def test_a_file_lands_once(settings, prompt):
    new = file(settings.project, "a.csv", "text,answer\n")
    assert states(land(settings, prompt, [new])) == ["landed"]
    assert states(land(settings, prompt, [new])) == ["unchanged"]
    assert [p.name for p in (settings.project / "zone/p").iterdir()] == ["a.csv"]


def test_other_content_is_replaced_only_when_asked(settings, prompt):
    new = file(settings.project, "a.csv", "old")
    land(settings, prompt, [new])
    new.write_text("new")
    other = file(settings.project, "b.csv", "b")
    with pytest.raises(BadInputError, match=r"zone/p holds other content under a\.csv"):
        land(settings, prompt, [other, new])
    zone = settings.project / "zone/p"
    assert (zone / "a.csv").read_text() == "old"
    assert not (zone / "b.csv").exists(), "nothing lands when one file cannot"
    assert states(land(settings, prompt, [other, new], replace=True)) == ["landed", "replaced"]
    assert (zone / "a.csv").read_text() == "new"


def test_a_missing_file_or_a_name_given_twice_is_refused(settings, prompt):
    with pytest.raises(BadInputError, match="no such file"):
        land(settings, prompt, [settings.project / "none.csv"])
    one = file(settings.project, "a.csv", "1")
    with pytest.raises(BadInputError, match=r"a\.csv"):
        land(settings, prompt, [one, one])
