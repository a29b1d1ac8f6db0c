"""The rows of a data file in any file format: JSON lines, a JSON array, CSV, parquet, or a data set of the Hugging Face Hub.

    rows_in(path, columns) reads a file row by row, without holding it whole (but for a JSON array); columns gives its columns
                           other names
    local_files(name)      the files behind `hub:NAME`, downloaded; a file stands for itself
"""

import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import re
import zlib
from pathlib import Path

from nanorlhf.errors import DataError, UserError, one_line
from nanorlhf.files import parse_json, sha256_of
from nanorlhf.formats.records import LABELS

OTHER_FORMATS = {b"ARROW1": "arrow", b"PK\x03\x04": "zip or xlsx", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
                 b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}      # by first bytes
TEXTS = {"text", "prompt", "completion", "chosen", "rejected", "instruction", "output", "response", "query", "question", "answer"}


def rows_in(path, columns=()):
    """Yields (number, row): the lines of a file as bytes still to be parsed, or dicts. Numbers count from 1. They are those of
    lines, in CSV of a row's last line; in a JSON array and in parquet those of rows. columns: of `column_names`. A
    DataError names the file."""
    with open(path, "rb", 2**16) as raw:
        packed = raw.peek(2)[:2] == b"\x1f\x8b"
        f = io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**16) if packed else raw
        try:
            start = f.peek().removeprefix(b"\xef\xbb\xbf")                            # without a byte-order mark
            yield from _rows(path, f, start, columns)
        except (OSError, EOFError, zlib.error) as error:
            if not packed:
                raise
            raise DataError(f"{path}: broken gzip file ({one_line(error)})") from None


def _rows(path, f, start, columns):
    table = re.search(r"\.(csv|tsv)(\.gz)?$", str(path).lower())
    form = next((form for first, form in OTHER_FORMATS.items() if start.startswith(first)), None)
    parquet = start.startswith(b"PAR1")
    if b"\0" in start[:4]:
        form = form or "UTF-16 or binary"
    elif table and not form and not parquet:
        return _table_rows(path, f, "," if table[1] == "csv" else "\t", columns)
    elif start.strip() and not parquet and not re.search(rb"^[ \t\r]*[{[]", start, re.MULTILINE):
        form = form or "csv (name it .csv or .tsv) or other text"
    if form:
        raise DataError(f"{path}: {form}, not JSON: write one JSON object per line in UTF-8, plain or gzipped, for example with "
                        f"pandas' to_json(orient='records', lines=True)")
    if parquet:
        rows = _parquet_rows(path)
    elif start.lstrip()[:1] == b"[":
        try:
            rows = enumerate(parse_json(f.read().decode("utf-8-sig")), 1)
        except ValueError as error:
            raise DataError(f"{path}: bad JSON array ({one_line(error)})") from None
    else:
        if f.peek(3)[:3] == b"\xef\xbb\xbf":
            f.read(3)
        # A binary file is split at \n only: texts contain U+0085, a line end to str.splitlines.
        rows = ((number, line) for number, line in enumerate(f, 1) if line.strip())
    return ((number, renamed(row, columns)) for number, row in rows)


def _table_rows(path, f, delimiter, columns):
    """A row of CSV as a dict, by the header's names. An empty cell is absent, but in TEXTS it is an empty text. Lists stand as
    JSON in their cells."""
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.TextIOWrapper(f, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    try:
        theirs = next(lines, [])
        ours = {old: new for new, old in renamed(dict(zip(theirs, theirs)), columns).items()}
        header = [ours.get(name, "") for name in theirs]                               # "": another column took its name
        if twice := [name for i, name in enumerate(header) if name and name in header[:i]]:
            raise DataError(f"{path}: the header names {one_line(repr(twice[0]))} twice")
        for cells in lines:
            if len(cells) != len(header) and cells:
                raise DataError(f"{path}:{lines.line_num}: {len(cells)} cells under a header of {len(header)}")
            if any(cells):
                yield lines.line_num, {name: _cell(name, cell) for name, cell in zip(header, cells) if name}
    except UnicodeDecodeError:
        raise DataError(f"{path}: bad UTF-8 after line {lines.line_num}: save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: bad CSV ({one_line(error)})") from None


def _cell(name, cell):
    text = name in TEXTS
    if cell[:2] == "[{" or not text and cell[:1] in ("[", "{"):                        # messages; responses, scores
        with contextlib.suppress(ValueError):
            return parse_json(cell)
    if name in LABELS:                            # 0 or false: not to be imitated; others, such as "pos", are texts
        with contextlib.suppress(ValueError):
            return {"true": True, "false": False}.get(cell.lower(), cell) if cell.isalpha() else float(cell)
    return cell if text or cell else None


def _parquet_rows(path):
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs the extra `data`: pip install -e '.[data]'")
    try:
        batches = parquet.ParquetFile(path).iter_batches(1024)
        yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)
    except Exception as error:                    # pyarrow has an exception for each damage
        raise DataError(f"{path}: broken parquet file ({one_line(error)})") from None


def renamed(row, columns):
    """Returns a row, an object or its bytes, with other names of its columns: columns is {our name: the file's}. What a row
    does not have stays as it is."""
    if not columns:
        return row
    if isinstance(row, bytes):
        try:
            row = parse_json(row.decode())
        except ValueError:                        # records_of says what is wrong
            return row
    if not isinstance(row, dict):
        return row
    taken = {ours: theirs for ours, theirs in columns.items() if theirs in row}
    others = {name: value for name, value in row.items() if name not in taken and name not in taken.values()}
    return others | {ours: row[theirs] for ours, theirs in taken.items()}


def column_names(text):
    """"prompt=question,chosen=good" (--columns) -> {our name: the file's}."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    if not all(ours and theirs for ours, _, theirs in pairs) or len({ours for ours, *_ in pairs}) < len(pairs):
        raise UserError(f"--columns {text}: want OURS=THEIRS,OURS=THEIRS, each name once, as in prompt=question,chosen=good")
    return {ours: theirs for ours, _, theirs in pairs}


def local_files(name):
    """Returns the files behind a name: of `hub:NAME`, `hub:NAME:CONFIG` or `hub:NAME:CONFIG:SPLIT` (train, if none is named) the
    parquet files that the Hub keeps of every data set, downloaded once; else the file itself. UserError says what is missing."""
    return list(_hub_files(name)) if str(name).startswith("hub:") else [Path(name)]


@functools.lru_cache
def _hub_files(name):
    repository, config, split, *more = [*name.split(":")[1:], "", "", ""][:4]
    split = split or "train"
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError:
        raise UserError(f"{name}: data sets of the Hub need the extra `data`: pip install -e '.[data]'")
    kept = dict(repo_type="dataset", revision="refs/convert/parquet")
    try:
        files = sorted(file for file in HfApi().list_repo_files(repository, **kept) if file.endswith(".parquet"))
        there = {tuple(file.split("/")[:2]) for file in files}                         # (config, split)
        configs = list(dict.fromkeys(c for c, _ in sorted(there)))
        config = config or ("default" if "default" in configs else configs[0] if len(configs) == 1 else "")
        wanted = [file for file in files if file.split("/")[:2] == [config, split]]
        downloaded = [Path(hf_hub_download(repository, file, **kept)) for file in wanted]
    except Exception as error:                    # offline, unknown, gated, no disk: the Hub has an exception for each
        raise UserError(f"{name}: the Hub did not give it ({type(error).__name__}: {one_line(error)}); offline, give a file")
    if not downloaded or any(more):
        known = ", ".join(f"hub:{repository}:{c}:{s}" for c, s in sorted(there)[:8])
        raise UserError(f"{name}: no such data set; the Hub has {known or 'no parquet files of it'}")
    return downloaded


def data_sha256(name):
    """Returns the sha256 of the file behind a name, of `hub:` of all its files together; None if there is none."""
    files = local_files(name)
    if not all(file.is_file() for file in files):
        return None
    digests = [sha256_of(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
