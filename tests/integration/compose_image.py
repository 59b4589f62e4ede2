"""What a container of one of our images starts with, read from the Dockerfile: environment, working folder, command, and the files that
COPY lays in it.

RUN lines are not executed: what they install is one environment of this machine (`compose_environment`).
"""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from compose_file import ComposeError

__all__ = ["Image", "read_image"]

SYSTEM = re.compile(r"/(bin|sbin|lib\w*|usr|proc|sys|dev|etc)(/|$)")


@dataclass
class Image:
    environment: dict[str, str] = field(default_factory=dict)
    working_dir: str = "/"
    user: str = "root"
    has_torch: bool = False
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    copies: list[tuple[str, str]] = field(default_factory=list)
    """Path in the build context, absolute path in the image."""

    @property
    def paths(self) -> set[str]:
        """Folders and files of the image that its own lines name; programs and libraries of the system apart."""
        found = {self.working_dir, *(target for _, target in self.copies)}
        for value in self.environment.values():
            found |= {part for part in value.split(":") if part.startswith("/") and not SYSTEM.match(part)}
        return {path.rstrip("/") for path in found} - {""}

    def lay(self, project: Path, root: Path) -> None:
        """Copies what the image holds of the project under `root`, without what .dockerignore names."""
        ignored = _ignored(project)
        for source, target in self.copies:
            place = root / target.lstrip("/")
            if (project / source).is_dir():
                shutil.copytree(project / source, place, dirs_exist_ok=True, ignore=ignored)
            else:
                place = place / source.rpartition("/")[2] if target.endswith("/") else place
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(project / source, place)


def read_image(dockerfile: Path, target: str, arguments: Mapping[str, str]) -> Image:
    """The image of a target (the last stage where it is empty), as a chain of the stages that it is built from."""
    stages: dict[str, list[tuple[str, str]]] = {}
    bases: dict[str, str] = {}
    name, before = "", dict(arguments)
    for keyword, rest in _instructions(dockerfile.read_text("utf-8")):
        if keyword == "FROM":
            words = [word for word in rest.split() if not word.startswith("--")]
            name = words[2] if len(words) > 2 else str(len(stages))
            bases[name], stages[name] = words[0], []
        elif stages:
            stages[name].append((keyword, rest))
        elif keyword == "ARG":
            key, _, default = rest.partition("=")
            before.setdefault(key, default)
    target = target or name
    if target not in stages:
        raise ComposeError(f"{dockerfile} has no target {target!r}; it has {', '.join(stages)}")
    chain = [target]
    while bases[chain[0]] in stages:
        chain.insert(0, bases[chain[0]])
    image = Image()
    for stage in chain:
        known = dict(before)
        for keyword, rest in stages[stage]:
            _apply(image, keyword, rest, known, arguments)
    return image


def _instructions(text: str) -> list[tuple[str, str]]:
    """Keyword and the rest of each instruction; comments, line continuations and heredocs taken care of."""
    found, lines = [], iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        while line.rstrip().endswith("\\"):
            more = next(lines, "")
            line = line if more.lstrip().startswith("#") else line.rstrip()[:-1] + " " + more.strip()
        for word in re.findall(r"<<-?[\"']?(\w+)", line):
            while next(lines, word).strip() != word:
                pass
        keyword, _, rest = line.strip().partition(" ")
        found.append((keyword.upper(), rest.strip()))
    return found


def _apply(image: Image, keyword: str, rest: str, known: dict[str, str], arguments: Mapping[str, str]) -> None:
    if keyword == "ARG":
        key, _, default = rest.partition("=")
        known[key] = arguments.get(key, known.get(key, default.strip('"')))
    elif keyword == "ENV":
        for pair in shlex.split(rest):
            key, _, value = pair.partition("=")
            image.environment[key] = _put_in(value, {**known, **image.environment})
    elif keyword == "WORKDIR":
        image.working_dir = str(PurePosixPath(image.working_dir) / _put_in(rest, {**known, **image.environment}))
    elif keyword == "RUN":
        image.has_torch |= " torch==" in rest
    elif keyword == "USER":
        image.user = rest
    elif keyword == "ENTRYPOINT":
        image.entrypoint, image.command = _words(rest), ()
    elif keyword == "CMD":
        image.command = _words(rest)
    elif keyword in ("COPY", "ADD"):
        words = rest.split()
        flags = [word for word in words if word.startswith("--")]
        *sources, target = [_put_in(word, {**known, **image.environment}) for word in words if not word.startswith("--")]
        if not any(flag.startswith("--from") for flag in flags):
            for source in sources:
                image.copies.append((source.rstrip("/") or ".", _target(image, source, target, len(sources))))


def _target(image: Image, source: str, target: str, sources: int) -> str:
    place = str(PurePosixPath(image.working_dir) / target)
    return f"{place}/" if sources > 1 or target.endswith(("/", ".")) else place


def _words(text: str) -> tuple[str, ...]:
    return tuple(json.loads(text)) if text.startswith("[") else ("/bin/sh", "-c", text)


def _put_in(text: str, values: Mapping[str, str]) -> str:
    def one(found: re.Match[str]) -> str:
        return values.get(found[1] or found[2], "") or (found[3] or "")

    return re.sub(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})", one, text)


def _ignored(project: Path):
    """For shutil.copytree: names that .dockerignore leaves out of the build context."""
    file = project / ".dockerignore"
    patterns = [line.strip().strip("/") for line in file.read_text().splitlines()] if file.is_file() else []
    patterns = [pattern for pattern in patterns if pattern and not pattern.startswith("#")]

    def ignore(folder: str, names: list[str]) -> set[str]:
        out: set[str] = set()
        for name in names:
            path = (Path(folder) / name).relative_to(project).as_posix()
            out_now = name in (".git", "__pycache__")
            for pattern in patterns:
                wanted = pattern.lstrip("!").strip("/")
                if fnmatch(path, wanted) or (wanted.startswith("**/") and fnmatch(name, wanted[3:])):
                    out_now = not pattern.startswith("!")
            if out_now:
                out.add(name)
        return out

    return ignore
