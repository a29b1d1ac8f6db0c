"""What no algorithm has to know: options, files that survive a crash, devices, the run folder, resuming, progress."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file


class UserError(ValueError):
    """Something the user can put right: shown as one line, without a traceback."""


class DataError(UserError):
    """A file, row or text that cannot be used; the message is one line fit to be printed as it is."""


# ---------------------------------------------------------------------------------------------------------- options

def parse_options(Config, description="", argv=None):
    """Command line -> Config. A field a line; its trailing comment is its help. --lr 1e-5 and --lr=1e-5 both work."""
    help_of = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(Config), re.MULTILINE))

    class OneLineParser(argparse.ArgumentParser):
        def error(self, message):
            raise SystemExit(f"error: {message} (--help lists the options)")

    parser = OneLineParser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Config):
        text = f"{help_of.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        if field.type is bool:
            parser.add_argument(f"--{field.name}", type=_boolean, nargs="?", const=True, default=field.default,
                                metavar="BOOL", help=text)
        else:
            parser.add_argument(f"--{field.name}", type=field.type, default=field.default,
                                metavar=field.type.__name__.upper(), help=text)
    given = parser.parse_args(argv)
    if getattr(given, "resume", False):                   # a resumed run keeps the options that it was begun with
        parser.set_defaults(**_options_of_run(given.out, Config))
        given = parser.parse_args(argv)
    return Config(**vars(given))


def _options_of_run(out, Config):
    """The options in a run folder's run.json that Config still has, apart from those that say how to begin."""
    file = Path(out) / "run.json"
    try:
        options = json.loads(file.read_text(encoding="utf-8"))["options"] if file.exists() else {}
        return {f.name: options[f.name] for f in dataclasses.fields(Config)
                if f.name in options and f.name not in ("out", "resume", "overwrite")}
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"error: {file} is damaged")


def _boolean(text):
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def main(Config, train, description):
    """Entry point of a script: options, then train(config); what the user can put right is one line and exit code 1."""
    config = parse_options(Config, description)
    try:
        train(config)
    except (UserError, OSError) as error:                 # OSError: a full disk, a folder that may not be written to
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; continue with: {Path(sys.argv[0]).name} ... --out {config.out} --resume")
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of memory; lower --micro_batch_size ({str(error).splitlines()[0]})")


# ------------------------------------------------------------------------------------------------------------ files

@contextlib.contextmanager
def written_whole(path):
    """Yields a temporary path beside `path`, a file or a folder; flushes it to disk and renames it into place at the end.

    A crash at any moment leaves either the old content or the new, never a half-written one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    yield temporary
    umask = os.umask(0)
    os.umask(umask)
    for file in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
        os.chmod(file, 0o666 & ~umask)            # safetensors leaves its files readable by their owner alone
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
    if path.is_dir() and temporary.is_dir():
        shutil.rmtree(path)                       # rename cannot replace a folder; the new one is already on disk
    os.replace(temporary, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_json(path, value):
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_records(path, records):
    """JSON lines, one record a line."""
    with written_whole(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)


def read_jsonl(path):
    """Rows of a log that we wrote ourselves; a last line cut off by a crash is dropped."""
    rows = []
    for line in Path(path).read_bytes().split(b"\n") if Path(path).exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


# -------------------------------------------------------------------------------------------------------- one run

def seed_for(seed, *keys):
    """A 63-bit seed for one purpose: all randomness is a pure function of (seed, purpose, step), none is carried along,
    so a resumed run draws what the uninterrupted one would have drawn."""
    words = [seed] + [int.from_bytes(hashlib.sha256(str(k).encode()).digest()[:8], "little") for k in keys]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(step, total, peak, warmup=0, schedule="linear"):
    """Rate of update `step` (0-based) of `total`: linear warm-up, then constant, linear to 0 or cosine to 0. The warm-up takes
    a fifth of the steps at the most, or a short run would end within it."""
    warmup = min(warmup, total // 5)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[schedule]


def make_optimizer(parameters, name, lr, weight_decay=0.0, eps=1e-8):
    """adamw, adam or rmsprop (the DPO paper's). Decay acts on matrices only, as usual: not on norms and biases."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [dict(params=[p for p in parameters if p.dim() > 1], weight_decay=weight_decay),
              dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=0.0)]
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, eps=eps)
    if name not in ("adamw", "adam"):
        raise UserError(f"--optimizer {name}: not one of adamw, adam, rmsprop")
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters)
    return (torch.optim.AdamW if name == "adamw" else torch.optim.Adam)(groups, lr=lr, eps=eps, fused=fused)


LEAST = dict(batch_size=1, micro_batch_size=0, max_steps=0, limit=0, max_length=0, max_prompt_length=0, response_length=1,
             num_ppo_epochs=1, num_mini_batches=1, warmup_steps=0, resample_every=0)     # of options that count something


FREE = ("out", "resume", "overwrite", "device", "compile", "micro_batch_size", "eval_every", "save_every")  # on --resume


class Run:
    """The run folder and the device of one script: metrics.jsonl, samples.jsonl, run.json, checkpoints/, and at the end a
    checkpoint folder that other software loads. `config` is the script's Config."""

    def __init__(self, config, name, **choices):
        """choices: the words that an option may be. Nothing is written before load_checkpoint, so that a bad input costs
        no folder and, with --overwrite, no earlier run."""
        self.config, self.name, self.out = config, name, Path(config.out)
        self.device = pick_device(config.device)
        choices |= dict(keep=("end", "start", "tldr"), dtype=("float32", "bfloat16"),
                        lr_schedule=("cosine", "linear", "constant"),
                        optimizer=("adamw", "adam", "rmsprop"))
        for option, words in choices.items():
            if (value := getattr(config, option, words[0])) not in words:
                raise UserError(f"--{option} {value}: not one of {', '.join(words)}")
        for option, least in LEAST.items():
            if (value := getattr(config, option, least)) < least:
                raise UserError(f"--{option} {value}: must be at least {least}")
        if not 0 <= getattr(config, "eval_fraction", 0.0) < 1:
            raise UserError(f"--eval_fraction {config.eval_fraction}: must lie in [0, 1)")
        for option in ("epochs", "beta", "top_p"):
            if getattr(config, option, 1.0) <= 0:
                raise UserError(f"--{option} {getattr(config, option)}: must be above 0")
        previous = self.out / "run.json"
        if config.resume and not previous.exists():
            raise UserError(f"{self.out} holds no run to resume")
        if self.out.exists() and any(self.out.iterdir()) and not config.resume:
            if not config.overwrite:
                raise UserError(f"{self.out} already holds files: name another --out, or continue with --resume, "
                                f"or replace it with --overwrite")
            if not previous.exists():
                raise UserError(f"{self.out} is not a run folder, so --overwrite does not touch it")
        before = json.loads(previous.read_text(encoding="utf-8")) if config.resume else {}
        if before.get("script", name) != name:
            raise UserError(f"{self.out} is a run of another script, {before['script']}: {name} cannot resume it")
        self.finished = before.get("finished", False)
        if self.finished:
            print(f"{self.out} is finished already", flush=True)
        data = Path(getattr(config, "data", ""))
        self.data_sha256 = hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else None    # as the run began with it
        if not self.finished and before.get("data_sha256", self.data_sha256) != self.data_sha256:
            raise UserError(f"--data {config.data} has changed since the run in {self.out} began")
        for option, value in () if self.finished else dataclasses.asdict(config).items():
            if option not in FREE and value != (was := before.get("options", {}).get(option, value)):
                raise UserError(f"--{option} {value}: the run in {self.out} was begun with {was}, and --resume goes on as it was")
        self.started, self.printed, self.tokens, self.first_step = time.monotonic(), 0.0, 0, 0

    def _write_run_json(self, finished):
        versions = {p: importlib.metadata.version(p) for p in ("torch", "tiktoken", "numpy", "safetensors")}
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
        write_json(self.out / "run.json", dict(
            script=self.name, finished=finished, options=dataclasses.asdict(self.config), data_sha256=self.data_sha256,
            device=device, commit=git_commit(), python=platform.python_version(), **versions))

    def autocast(self):
        """Master weights stay float32; --dtype bfloat16 is autocast."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def prepare(self, model, tokenizer):
        """Moves a model, which reads this tokenizer's ids, to the device; with --compile, compiles its stack of layers."""
        trunk = need_fit(model, tokenizer)
        # What responses end and rows are filled with is what config.json shall say; a list of ends, or pad = EOS, is not.
        trunk.config.eos_id, trunk.config.pad_id = tokenizer.eos_id, tokenizer.pad_id
        model.to(self.device)
        if self.config.compile:
            trunk.stack = torch.compile(trunk.stack, dynamic=True)
        return model

    @staticmethod
    def every(n, step, total):
        """Whether something done every n steps (0: never), and after the last, is due after `step` finished steps."""
        return n > 0 and (step % n == 0 or step == total)

    def step(self, rates, max_grad_norm, step, rows, loss):
        """One guarded step of each optimizer; rates: {optimizer: learning rate}. Clips each one's gradient to max_grad_norm
        (0: no clipping) and returns the first one's norm before that.

        A non-finite loss or gradient stops the run here, before any weight changes. rows: indices of the batch's examples.
        """
        norms = [float(torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]],
                                                      max_grad_norm or math.inf)) for optimizer in rates]
        if not all(map(math.isfinite, [loss, *norms])):
            raise UserError(f"step {step}: loss {loss}, gradient norm {', '.join(map(str, norms))}, on the examples "
                            f"{list(rows)[:8]} (of {len(rows)}); the weights were not changed (lower --lr?)")
        for optimizer, lr in rates.items():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms[0]

    # -- what the run says

    def log(self, step, total, metrics, tokens=0):
        """Appends one row to metrics.jsonl and shows progress; `step` counts finished steps, `tokens` those it processed."""
        row = {k: float(v) for k, v in metrics.items()}
        if bad := [k for k, v in row.items() if not math.isfinite(v)]:
            raise UserError(f"step {step}: {', '.join(bad)} not finite")
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, "time": round(time.monotonic() - self.started, 3), **row}) + "\n")
        self.tokens += tokens
        now = time.monotonic()
        if step >= total or step == 1 or now - self.printed > 5:
            self.printed = now
            seconds = max(now - self.started, 1e-9)
            left = int(seconds / max(1, step - self.first_step) * (total - step))
            shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if not k.startswith("eval/"))
            speed = f"{self.tokens / seconds:,.0f} tokens/s  " if self.tokens else ""
            print(f"{self.name} {step}/{total}  {shown}  {speed}{left // 60}:{left % 60:02d} left", flush=True)
        if evals := {k: v for k, v in row.items() if k.startswith("eval/")}:
            print(f"{self.name} {step}/{total}  " + "  ".join(f"{k} {v:.4g}" for k, v in evals.items()), flush=True)

    def samples(self, step, records):
        """Appends texts to samples.jsonl."""
        with open(self.out / "samples.jsonl", "a", encoding="utf-8") as f:
            f.writelines(json.dumps({"step": step, **r}, ensure_ascii=False) + "\n" for r in records)

    # -- what survives it

    def save_checkpoint(self, step, modules, optimizers, state=None):
        """checkpoints/step-N: weights and optimizer tensors in safetensors, the rest in JSON with a sha256 of each file."""
        with written_whole(self.out / "checkpoints" / f"step-{step:07d}") as folder:
            folder.mkdir()
            for name, module in modules.items():
                save_file({k: v.detach().contiguous() for k, v in module.state_dict().items()}, folder / f"{name}.safetensors")
            for name, optimizer in optimizers.items():
                tensors = {f"{i}.{k}": torch.as_tensor(v).contiguous() for i, entry in optimizer.state_dict()["state"].items()
                           for k, v in entry.items() if v is not None}
                save_file(tensors, folder / f"{name}.safetensors")
            hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}
            state = dict(step=step, **(state or {}))
            write_json(folder / "state.json", dict(state, sha256=dict(hashes, state=digest_of(state))))
        for old in sorted((self.out / "checkpoints").glob("step-*"))[:-2]:
            shutil.rmtree(old)

    def load_checkpoint(self, modules, optimizers):
        """Restores the newest checkpoint in place and returns its state, or {"step": 0} where there is none yet. Without
        --resume it begins the run folder."""
        if not self.config.resume:
            if self.out.exists() and self.config.overwrite:
                shutil.rmtree(self.out)
            self._write_run_json(finished=False)
        folders = sorted((self.out / "checkpoints").glob("step-*")) if self.config.resume else []
        state = self._checked_state(folders[-1]) if folders else {"step": 0}
        if folders:
            for name, module in modules.items():
                module.load_state_dict(load_file(folders[-1] / f"{name}.safetensors", device=str(self.device)))
            for name, optimizer in optimizers.items():
                entries = {}
                for key, tensor in load_file(folders[-1] / f"{name}.safetensors").items():
                    index, field = key.split(".", 1)
                    entries.setdefault(int(index), {})[field] = tensor
                optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        if self.config.resume:                            # what came after the checkpoint will be done, and said, again
            for log in (self.out / "metrics.jsonl", self.out / "samples.jsonl"):
                if log.exists():
                    write_records(log, [r for r in read_jsonl(log) if r["step"] <= state["step"]])
            self.first_step = state["step"]
            print(f"{self.name} resumes {self.out} after step {state['step']}", flush=True)
        return state

    @staticmethod
    def _checked_state(folder):
        """state.json of a checkpoint, after comparing each file's sha256: safetensors would load a flipped bit silently."""
        def damaged(file):
            return UserError(f"{file} is damaged: delete {folder} to resume from the checkpoint before it")
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            digests = state.pop("sha256")
            intact = digests.pop("state") == digest_of(state)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise damaged(folder / "state.json")
        for name, digest in digests.items():
            file = folder / name
            if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                raise damaged(file)
        return state

    def finish(self, model, tokenizer):
        """Writes the checkpoint folder that from_pretrained, transformers and vLLM load, then marks the run finished."""
        model.save_pretrained(self.out)
        tokenizer.save(self.out)
        self.done()

    def done(self):
        self._write_run_json(finished=True)
        print(f"{self.name} done: {self.out}", flush=True)


def digest_of(state):
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no GPU here")
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device that torch knows")


@functools.lru_cache
def local_folder(name):
    """The folder of a checkpoint: one that is here, or the download of one that the Hugging Face hub has by that name."""
    if isinstance(name, Path):                    # found before
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
        raise UserError(f"{name}: no such folder here, and the hub did not give it ({type(error).__name__}); offline, give the "
                        f"folder of a downloaded checkpoint (config.json, model.safetensors, tokenizer files)")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{name}: the hub has no safetensors of it, and a pickle, which could run any code, is not read: convert "
                        f"it with transformers' from_pretrained and save_pretrained, and give that folder")
    return folder


def need_folder(name, made_by):
    """The checkpoint folder of that name, here or from the hub; or one line that names the command which makes it."""
    folder = local_folder(name)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no checkpoint (no config.json in it)"
                        + (f"; first run: {made_by}" if folder.parts[:1] == ("out",) else ""))
    return folder


def need_fit(model, tokenizer):
    """The model's trunk, which has an embedding for each of the tokenizer's ids."""
    trunk = getattr(model, "trunk", model)
    if trunk.config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"the {type(model).__name__} of {trunk.config.vocab_size} tokens does not fit the tokenizer of "
                        f"{tokenizer.vocab_size}: they do not belong together")
    return trunk


def need_same_vocabulary(what, model, policy):
    if model.config.vocab_size != policy.config.vocab_size:
        raise UserError(f"{what}: its vocabulary ({model.config.vocab_size}) is not the policy's ({policy.config.vocab_size})")


MAKE_COMPARISONS = ("python sample_bon.py --split train --limit 8000 --n 2 --reward gold --label_temperature 0.2 "
                    "--out out/comparisons")              # the default --data of train_rm.py and train_dpo.py


def need_file(file, made_by):
    if not Path(file).exists():
        raise UserError(f"{file} is missing; first run: {made_by}")
    return file


def git_commit():
    """Commit of the code that runs, with + when files differ from it; '' outside a checkout."""
    def git(*args):
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
