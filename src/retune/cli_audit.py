"""`retune audit`: a prompt's history as a document to sign."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from retune.cli_output import AsJson, console, emit
from retune.errors import ConfigError, IntegrityError

__all__ = ["audit"]


def audit(
    prompt: Annotated[str, typer.Argument(help="Name of a prompt file.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the document to this file; none: print it.")] = None,
    form: Annotated[
        Literal["html", "md"] | None, typer.Option("--format", help="Default: as the file's name ends; Markdown where it is printed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the whole history of a prompt, with each decision's evidence, as one document for whoever must sign it.

    The chain of hashes is verified; if it does not hold, the document says so and is written all the same, and the exit code is 1.
    """
    from retune import document
    from retune.audit import audit, blocks, title
    from retune.cli_output import plain
    from retune.config import load_prompt
    from retune.settings import Settings
    from retune.store import open_store

    form = form or _form_of(out)
    settings = Settings.load()
    found = audit(open_store(settings), load_prompt(settings.prompts / f"{prompt}.yaml"))
    text = (document.html if form == "html" else document.markdown)(title(found.prompt), blocks(found))
    if out:
        try:
            out.write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    if as_json:
        emit(found.to_json())
    elif out:
        head = found.heads.get(prompt)
        pinned = f"; head: entry {head.n}, sha256 {head.sha256}" if head else ""
        console().print(f"wrote {out}: {len(found.entries)} entries{pinned}", markup=False)
    else:
        plain(text.rstrip("\n"))
    if found.problems:
        raise IntegrityError(f"the history of {prompt} does not verify, as the document says: {'; '.join(found.problems)}")


def _form_of(out: Path | None) -> Literal["html", "md"]:
    forms: dict[str, Literal["html", "md"]] = {".html": "html", ".htm": "html", ".md": "md"}
    if out is None:
        return "md"
    if out.suffix.lower() not in forms:
        raise ConfigError(f"--out must end in .html or .md where --format is not given, got {out}")
    return forms[out.suffix.lower()]
