"""Stage resolve: a prompt file as a person writes it in, the same with every default written out.

Reads::

    prompts/<prompt>.yaml

Writes::

    artifacts/<prompt>/prompt.yaml   what the other stages read; its fields are the parameters that DVC compares

Runs by hand only: the workspace of an Airflow task lays the file itself. Raises: ConfigError on a wrong prompt file. Retry: safe.
"""

from pathlib import Path

from retune.config import Prompt, resolved_yaml
from retune.stages import run_stage


def main(prompt: Prompt) -> None:
    place = Path(f"artifacts/{prompt.name}/prompt.yaml")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(resolved_yaml(prompt), "utf-8")


if __name__ == "__main__":
    run_stage(main, "prompts/{}.yaml")
