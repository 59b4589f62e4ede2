"""Which encoding a landed text file has, and its lines, however long, in bounded memory."""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, cast

from charset_normalizer import from_bytes

from retune.errors import BadInputError

__all__ = [
    "FREE_BYTES",
    "MAX_EXPANSION",
    "MAX_RECORD",
    "CutLine",
    "Encoding",
    "expands",
    "find_encoding",
    "first_lines",
    "open_bytes",
    "read_lines",
]

MAX_RECORD = 1_000_000
"""Characters of a line or record; what is longer is quarantined, and only its start is held."""
MAX_EXPANSION = 100
"""Times its own size that a compressed object may hold."""
FREE_BYTES = 64 << 20
"""What any compressed object may hold besides."""
_SAMPLE_LINES = 200
_SAMPLE_CHARACTERS = 2_000_000
_BLOCK = 1 << 16
_ESCAPES = ("idna", "punycode", "raw-unicode-escape", "unicode-escape", "utf-7")
"""Codecs that are no encodings of files, or give half characters (utf-7)."""
_SAMPLE = 1 << 16
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_PLAUSIBLE = (
    *("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "iso8859_2", "iso8859_15", "koi8_r"),
    *("shift_jis", "cp932", "euc_jp", "gb18030", "big5", "euc_kr", "cp949"),
)


@dataclass(frozen=True)
class Encoding:
    name: str
    """A codec's name."""
    lossy: bool
    """Whether some bytes may not decode: they come out as U+FFFD."""
    assumption: str | None
    """A sentence for the user; None for plain UTF-8."""


class CutLine(str):
    """The start of a line that is longer than the limit; any other line is a plain `str`."""

    __slots__ = ()


def expands(size: int, expansion: float) -> BadInputError:
    """The error for an object of `size` bytes that holds more than it may: it was made to fill memory or disk, or to take for ever."""
    return BadInputError(
        f"holds more than {FREE_BYTES + int(size * expansion):,} bytes, {expansion:g} times its own size; raise source.max_expansion "
        "in the prompt file if that is right, or land it as plain CSV or JSON lines"
    )


class _Unpacked(gzip.GzipFile):
    """A gzip file that ends in an error where it holds more than it may."""

    def __init__(self, path: Path, expansion: float) -> None:
        super().__init__(path, "rb")
        self._packed = path.stat().st_size
        self._expansion = expansion

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(size)
        if self.tell() > FREE_BYTES + self._packed * self._expansion:
            raise expands(self._packed, self._expansion)
        return block


def open_bytes(path: Path, compressed: bool, expansion: float = MAX_EXPANSION) -> IO[bytes]:
    """The file's content. Reading it raises BadInputError where a compressed one holds more than `expansion` allows."""
    return cast(IO[bytes], _Unpacked(path, expansion)) if compressed else path.open("rb")


def find_encoding(path: Path, compressed: bool, given: str | None, expansion: float = MAX_EXPANSION) -> Encoding:
    """Reads the file once. Raises BadInputError for a broken gzip file or an unknown encoding name."""
    if given is not None:
        return Encoding(_known(given), lossy=True, assumption=None)
    with open_bytes(path, compressed, expansion) as stream:
        head = _read_block(stream, _SAMPLE)
        for bom, name in _BOMS:
            if head.startswith(bom):
                assumption = None if name == "utf-8-sig" else f"encoding {name} (byte order mark)"
                return Encoding(name, lossy=True, assumption=assumption)
        if len(head) > 1 and head.count(0) * 4 > len(head):
            name = "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
            return Encoding(name, lossy=True, assumption=f"encoding {name} (zero bytes between the letters)")
    bad, sample = _first_bad_byte(path, compressed, expansion)
    if bad is None:
        return Encoding("utf-8", lossy=False, assumption=None)
    lenient = sample.decode("utf-8", "replace")
    broken = lenient.count("\ufffd")
    if sum(character > "\x7f" for character in lenient) - broken > broken:
        return Encoding("utf-8", True, f"encoding UTF-8 although byte {bad} is not valid; rows that hold such bytes are quarantined")
    name = _guess(sample)
    return Encoding(name, True, f"encoding {name} (not valid UTF-8 at byte {bad})")


def read_lines(stream: IO[bytes], encoding: str, limit: int = MAX_RECORD) -> Iterator[str]:
    """Lines without their ends (LF, CR LF; or CR in a file whose first block has no LF).

    Raises BadInputError for a broken gzip file.
    """
    return chain.from_iterable(_blocks_of_lines(stream, encoding, limit))


def _blocks_of_lines(stream: IO[bytes], encoding: str, limit: int) -> Iterator[list[str]]:
    """The lines that each block of the file ends: no line of an ordinary file is looked at on its own."""
    decoder = codecs.getincrementaldecoder(encoding)("replace")
    end: str | None = None
    pending, head, cut = "", "", False
    while True:
        block = _read_block(stream, _BLOCK)
        pending += decoder.decode(block, final=not block)
        if end is None and pending:
            end = "\r" if "\n" not in pending and "\r" in pending.rstrip("\r") else "\n"
        returns = "\r" in pending
        *whole, pending = pending.split(end or "\n")
        if whole and (cut or max(map(len, whole)) > limit):
            first = [CutLine(head)] if cut else []
            yield first + [CutLine(line[:limit]) if len(line) > limit else line.removesuffix("\r") for line in whole[len(first) :]]
            cut = False
        elif whole:
            yield [line.removesuffix("\r") for line in whole] if returns else whole
        if cut:
            pending = ""
        elif len(pending) > limit:
            head, pending, cut = pending[:limit], "", True
        if not block:
            if cut or pending:
                yield [CutLine(head) if cut else pending.removesuffix("\r")]
            return


def first_lines(lines: Iterable[str]) -> list[str]:
    """The first lines, by which a file is understood: at most 200, and fewer long ones."""
    sample: list[str] = []
    characters = 0
    for line in lines:
        sample.append(line)
        characters += len(line)
        if len(sample) == _SAMPLE_LINES or characters >= _SAMPLE_CHARACTERS:
            break
    return sample


def _known(name: str) -> str:
    """The name. Raises BadInputError if it is no encoding of text, or one in which a file could name any character (and take for ever)."""
    try:
        if codecs.lookup(name).name in _ESCAPES or "a".encode(name).decode(name) != "a":
            raise LookupError
    except (LookupError, ValueError):
        raise BadInputError(f"source.encoding must name a text encoding such as cp1252, got {name!r}") from None
    return name


def _read_block(stream: IO[bytes], size: int) -> bytes:
    try:
        return stream.read(size)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadInputError(f"not a whole gzip file: {error}; land it again") from None


def _first_bad_byte(path: Path, compressed: bool, expansion: float) -> tuple[int | None, bytes]:
    """Place of the first byte that is not UTF-8, and the bytes from a little before it."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    place = 0
    previous = b""
    with open_bytes(path, compressed, expansion) as stream:
        while True:
            block = _read_block(stream, _BLOCK)
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                bad = place - held + error.start
                return bad, previous + block + _read_block(stream, _SAMPLE)
            if not block:
                return None, b""
            place += len(block)
            previous = block


def _guess(sample: bytes) -> str:
    # Bytes without accents say nothing; lines that have some say more per byte.
    telling = b"\n".join(line for line in sample.splitlines() if any(byte > 0x7F for byte in line))[:_SAMPLE]
    matches = list(from_bytes(telling, cp_isolation=list(_PLAUSIBLE)))
    if not matches:
        return "cp1252"
    best = matches[0]
    for match in matches:
        names = {match.encoding, *match.could_be_from_charset}
        if "cp1252" in names and match.chaos <= best.chaos and match.coherence >= best.coherence - 0.05:
            return "cp1252"
    return best.encoding
