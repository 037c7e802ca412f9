"""Reading files that others made, and writing files so that nobody finds half of one.

A model folder or a data file comes from somebody else. Its size is checked before it is read, and
whatever is wrong with it is reported in one line (InputError). Symbolic links are followed,
because the cache of the Hugging Face hub consists of them.
"""
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from support.errors import InputError

# Bytes of a file; in memory its contents may be 25 times as large.
LARGEST = 4 << 20  # of JSON, a template, or the header of a safetensors file
LARGEST_TOKENIZER = 32 << 20  # that of Llama 3 has 17 MB; it is parsed in another process
LARGEST_DATA = 256 << 20
MOST_LINES = 2**20


def make_folder(path):
    """Create a folder and its parents, if they are missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file has this name, no permission, a read-only disk
        reason = error.strerror
        raise InputError(f"{path}: cannot be made a folder ({reason}); choose another") from None


@contextmanager
def replacing(path):
    """Yield a temporary path in the same folder. It is renamed to `path` if the block succeeds.

    If the block fails, the temporary file is removed and `path` stays as it was. InputError if
    the disk is full or the folder cannot be written.
    """
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # the content must be on disk before the name points to it
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({error}); "
                         "free some space or choose another folder") from None
    finally:
        with suppress(OSError):  # already renamed, or a read-only disk (reported above)
            temporary.unlink()


@contextmanager
def reading(path, largest):
    """A file of at most `largest` bytes, open for reading. InputError if there is none.

    Only ordinary files are read: opening a named pipe would wait for a writer forever.
    """
    path = Path(path)
    try:
        if not path.is_file():
            found = "; what is there is not an ordinary file" if path.exists() else ""
            raise InputError(f"{path}: no such file{found}")
        size = path.stat().st_size
        if size > largest:
            raise InputError(f"{path}: has {size:,} bytes; "
                             f"no file of its kind needs more than {largest:,}")
        with open(path, "rb") as file:
            yield file
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def read_text(path, largest=LARGEST):
    """The text of a UTF-8 file. InputError if there is none or it has more than `largest` bytes."""
    with reading(path, largest) as file:
        return file.read().decode()


def parse_json(text):
    """The value of a JSON text. ValueError or RecursionError if it is not valid.

    Strings with half of a surrogate pair are refused too: they cannot be written as UTF-8.
    """
    value = json.loads(text)
    if "\\u" in text:  # only an escape can make one
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path, largest=LARGEST):
    """The JSON object in a file. InputError if the file is missing, holds anything else, or has
    more than `largest` bytes."""
    try:
        value = parse_json(read_text(path, largest))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: is not a JSON object")
    return value


def write_json(path, value):
    """Write a value as a JSON file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_jsonl(path):
    """A file with one JSON object on each line -> its (line number, object), one after the other.

    Blank lines are skipped. InputError names the file and the line.
    """
    with reading(path, LARGEST_DATA) as file:
        for number in range(1, MOST_LINES + 1):
            line = file.readline(LARGEST + 1)
            if not line:
                return
            if len(line) > LARGEST:
                raise InputError(f"{path}, line {number}: has more than {LARGEST:,} bytes")
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode())
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number}: is not a JSON object")
            yield number, row
        if file.readline():
            raise InputError(f"{path}: has more than {MOST_LINES:,} lines")


def append_jsonl(path, rows):
    """Append rows to a file as lines of JSON. On a full disk none of them is added."""
    path = Path(path)
    size_before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    except OSError as error:
        with suppress(OSError):  # no such file, or a read-only disk: the first error is reported
            os.truncate(path, size_before)
        raise InputError(f"{path}: cannot be written ({error}); free some space, "
                         "then go on with --resume, or choose another --out") from None


def open_tensors(path, device="cpu"):
    """safetensors' safe_open, unless the header is so long that its names alone fill the memory.

    SafetensorError or OSError if it cannot be read.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST:
        raise SafetensorError(f"its header has {size:,} bytes; none needs more than {LARGEST:,}")
    return safe_open(path, framework="pt", device=str(device))


def sorted_header(data):
    """The bytes of a safetensors file with its header in sorted order.

    The library writes the metadata in an order that varies from process to process; sorted, equal
    contents are equal bytes.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    return len(text).to_bytes(8, "little") + text + data[8 + size:]
