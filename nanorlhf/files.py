"""Files and folders: writing that survives a crash, JSON lines, and checkpoint folders found here or on the Hugging Face hub."""

import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import shutil
import weakref
from pathlib import Path

from nanorlhf import ranks
from nanorlhf.errors import UserError

# ---- Writing and reading --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, for a file or a folder; flushes it to disk and renames it into place at the end.

    A crash at any moment leaves either the old content or the new one, never half of it; only between deleting an old folder
    and renaming a new one, it leaves neither. An error, such as a full disk, also removes the temporary path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    remove(temporary)                             # a crash may have left it
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            os.chmod(file, 0o666 & ~umask)        # safetensors makes its files readable by their owner only
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        if path.is_dir() and temporary.is_dir():
            remove(path)                          # rename cannot replace a folder; the new one is already on disk
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def remove(path):
    """Deletes a file or a folder, if there is one. A crash leaves no half of a folder under its name."""
    if path.is_dir():
        doomed = path.with_name(f".{path.name}.removing")
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rename(doomed)
        shutil.rmtree(doomed if doomed.exists() else path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class FolderLock:
    """Keeps other processes from a folder until this object, or the process, dies: two that write one folder would mix their
    rows and weights. FolderLock.of(folder) makes the folder and the lock; within a process all share one."""

    held = weakref.WeakValueDictionary()          # {folder: its lock}

    @classmethod
    def of(cls, folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = cls.held.get(folder.resolve()) or cls(folder)
        cls.held[folder.resolve()] = lock
        return lock

    def __init__(self, folder):
        self.descriptor = None
        try:
            import fcntl
            self.descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {folder}: wait for it, or name another --out")
        except (ImportError, OSError):            # Windows, or a file system without locks
            pass

    def __del__(self):
        if self.descriptor is not None:
            os.close(self.descriptor)


def write_text(path, text):
    """Writes a file, on the first rank only, as all that write below."""
    if ranks.mine() > 0:
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_records(path, records):
    """Writes JSON lines, one record per line."""
    if ranks.mine() > 0:
        return
    with atomic_write(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)


def append_records(path, records):
    """Appends JSON lines. A crash leaves at most one line half written, which read_jsonl drops."""
    if ranks.mine() > 0:
        return
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)


def parse_json(text):
    """json.loads, but with a ValueError for what is nested too deeply, as for other damage."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path):
    return parse_json(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path):
    """Reads a log that we wrote ourselves. A last line that a crash cut off is dropped; a missing file has no rows."""
    rows = []
    for line in Path(path).read_bytes().split(b"\n") if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(parse_json(line))
    return rows


def sha256_of(file):
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(2**24):
            digest.update(block)
    return digest.hexdigest()


CHECKPOINT_FILES = ("config.json", "generation_config.json", "*token*", "vocab*", "merges.txt", "chat_template*", "model*")
MIB = 2**20


def fingerprint(path):
    """Returns a sha256 that changes with the content of a file or of a checkpoint folder; None if there is neither.

    Of a folder, CHECKPOINT_FILES count, by name and content. Hashing gigabytes at each start would be slow, so of a .safetensors
    file there only the size, the first MiB (which names and places the tensors) and the last MiB are read. Training changes
    nearly every weight, so this notices another training, but not an edit of a few weights in the middle.
    """
    path = Path(path)
    if path.is_file():
        return sha256_of(path)
    names = sorted({file for pattern in CHECKPOINT_FILES for file in path.glob(pattern) if file.is_file()})
    if not names:
        return None
    digest = hashlib.sha256()
    for file in names:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as f:
            if file.suffix == ".safetensors" and size > 2 * MIB:
                digest.update(f.read(MIB))
                f.seek(-MIB, os.SEEK_END)
            digest.update(f.read())
    return digest.hexdigest()


# ---- Checkpoint folders ---------------------------------------------------------------------------------------------


@functools.lru_cache
def local_folder(name):
    """Returns the path of a checkpoint: a local folder, or a Hub name, which is downloaded."""
    if isinstance(name, Path):                    # already resolved
        return name
    folder = Path(name)
    here = folder.exists() or name.startswith((".", "/", "~", "out/")) or "/" in name and folder.parent.exists()
    if here or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder here; to download it from the hub install the extra `hub` "
                        f"(pip install -e '.[hub]'), or give the folder of a downloaded checkpoint")
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
        folder = Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:                    # offline, unknown, gated, no disk: the hub has an exception for each
        raise UserError(f"{name}: no such folder here, and the hub did not give it ({type(error).__name__}); offline, give "
                        f"the folder of a downloaded checkpoint (config.json, model.safetensors, tokenizer files)")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{name}: the hub has no safetensors of it, and a pickle, which could run any code, is not read: "
                        f"convert it with transformers' from_pretrained and save_pretrained, and give that folder")
    return folder


def require_folder(name, made_by, default=None):
    """Returns the path of a checkpoint folder. If it is missing, the error names the command that creates `default`, the default
    of the option (None: whatever lies in out/), or else files of similar names."""
    folder = local_folder(name)
    if not (folder / "config.json").exists():
        hint = folder.parts[:1] == ("out",) if default is None else name == default
        raise UserError(f"{folder} holds no checkpoint (no config.json in it)"
                        + (f"; first run: {made_by}" if hint else similar(folder)))
    return folder


def require_file(file, made_by, default=None):
    """Returns the file. If it is missing, the error names the command that creates `default`, the default of the option (None:
    any file), or else files of similar names."""
    if not Path(file).exists() and not str(file).startswith("hub:"):
        hint = default is None or file == default
        raise UserError(f"{file} is missing; first run: {made_by}" if hint else f"{file}: no such file{similar(Path(file))}")
    return file


def similar(path):
    """Names what lies beside a missing path and is spelt like it, as the end of an error."""
    try:
        names = difflib.get_close_matches(path.name, os.listdir(path.parent), 3, 0.75)
    except OSError:
        names = []
    return f"; did you mean {' or '.join(str(path.with_name(n)) for n in names)}?" if names and not path.exists() else ""
