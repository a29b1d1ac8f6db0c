"""The run folder of one script: refuse or resume, log, save checkpoints, finish.

A run folder holds metrics.jsonl, samples.jsonl, log.txt, run.json, checkpoints/ and, once finished, a checkpoint that other
software loads. Nothing in it is a pickle.
"""

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import subprocess
import threading
import time
import weakref
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanorlhf import ranks, terminal
from nanorlhf.data import of_each
from nanorlhf.errors import NotFinite, UserError
from nanorlhf.files import (FolderLock, append_records, atomic_write, fingerprint, read_json, read_jsonl, remove, sha256_of,
                            write_json, write_records)
from nanorlhf.formats.checkpoints import FAMILIES, check_finite, write_tensors
from nanorlhf.formats.sources import data_sha256
from nanorlhf.kernels import triton_kernels
from nanorlhf.model import ModelConfig, Transformer, check_fit, freeze, freeze_layers, pick_device
from nanorlhf.options import HOW_TO_BEGIN, STOP_SIGNALS, check_options, named_files, read_options, read_run
from nanorlhf.tokenizer import check_same_ids, load_tokenizer
from nanorlhf.training import seed_for

MAY_CHANGE_ON_RESUME = (*HOW_TO_BEGIN, "device", "shard", "deterministic", "compile", "gradient_checkpointing", "share_prompts",
                        "micro_batch_size", "eval_every", "save_every", "tensorboard")
INPUTS = ("init", "reference", "value_init", "tokenizer", "reward", "eval_reward", "eval_data", "eval_prompts", "normalize_data",
          "responses")
MAKE_COMPARISONS = ("python sample_bon.py --split train --limit 8000 --n 2 --reward gold --label_temperature 0.2 "
                    "--out out/comparisons")      # makes the default --data of train_rm.py and train_dpo.py
MAKE_BASE = "python train_sft.py --init scratch --family llama --kind text --packing false --lr 2.5e-3 --out out/base"

# The numbers that a terminal's line of progress has room for, and their names there.
IN_BRIEF = {"loss": "loss", "objective/scores": "reward", "scores/mean": "reward", "scores/best": "best", "objective/kl": "kl",
            "accuracy": "accuracy", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "objective/length": "length"}
NOT_YET = ".run.json.writing"         # all that is there if a run was killed while it wrote its first file


class Run:
    """The run folder and the device of one script; `config` is the script's Config and `name` the script's short name.

    Nothing is written until begin(), so bad input neither leaves a folder nor deletes the old run.
    """

    def __init__(self, config, name):
        """Raises UserError if an option is wrong or the folder may not be used."""
        check_options(config)
        self.config, self.name, self.out = config, name, Path(config.out)
        deterministic, shard = getattr(config, "deterministic", False), getattr(config, "shard", False)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                # read when CUDA starts
        self.device = ranks.join(pick_device(config.device), shard)
        if deterministic:                         # if torch only warns, attention's gradients do not repeat their bits
            torch_sampler = triton_kernels(torch.empty(0, device=self.device)) is None   # has no such kernel on a GPU
            torch.use_deterministic_algorithms(True, warn_only=torch_sampler)
        if shard and config.compile:
            raise UserError("--shard and --compile do not work together: leave one out")
        self.micro_batch_size = getattr(config, "micro_batch_size", 0) or config.batch_size
        self.data_sha256 = data_sha256(getattr(config, "data", ""))                    # the data as the run started
        self.inputs = {option: found for option in INPUTS if (found := content_of(getattr(config, option, "")))}
        self.finished = ranks.on_first(self._check_resumable if config.resume else self._check_unused)
        self.started, self.printed, self.tokens, self.first_step, self.step = time.monotonic(), 0.0, 0, 0, 0
        self.before = {"time": 0.0, "tokens": 0}  # of the parts of the run before this one
        self.new_writer, self.writer = summary_writer() if getattr(config, "tensorboard", False) else None, None

    def _check_unused(self):
        """Checks that a new run may write to the folder; returns False, for it is not finished. A run that ended before its first
        step has left nothing that could be lost."""
        there = {file.name for file in self.out.iterdir()} - {NOT_YET, "log.txt"} if self.out.exists() else set()
        if there == {"run.json"} and not read_run(self.out).get("finished", True):
            return False
        if there:
            if not self.config.overwrite:
                raise UserError(f"{self.out} already holds files: name another --out, or continue with --resume, "
                                f"or replace it with --overwrite")
            if not (self.out / "run.json").exists():
                raise UserError(f"{self.out} is not a run folder, so --overwrite does not touch it")
            for option in ("data", *INPUTS):
                for path in files_of(getattr(self.config, option, "")):
                    if self.out.resolve() in (path.resolve(), *path.resolve().parents):
                        raise UserError(f"--{option} {path} lies in --out {self.out}, which --overwrite deletes: move it, or "
                                        f"name another --out")
        return False

    def _check_resumable(self):
        """Checks that the run in the folder is one this config continues; returns whether it is finished already."""
        if not (self.out / "run.json").exists():
            raise UserError(f"{self.out} holds no run to resume")
        options = read_options(self.out, type(self.config))
        before = read_run(self.out)
        if before.get("script", self.name) != self.name:
            raise UserError(f"{self.out} is a run of another script, {before['script']}: {self.name} cannot resume it")
        for option, was in options.items():
            if option not in MAY_CHANGE_ON_RESUME and (value := getattr(self.config, option)) != was:
                longer = (f"; a longer run has another learning-rate schedule, so start one with --init {self.out} --out NEW"
                          if before.get("finished") and option in ("max_steps", "epochs") else "")
                raise UserError(f"--{option} {value}: the run in {self.out} was started with {was}; --resume cannot change it"
                                f"{longer}")
        if before.get("finished"):
            print(f"{self.out} is finished already", flush=True)
            return True
        now = self.inputs | {"data": self.data_sha256}
        for option, was in {**(before.get("inputs") or {}), "data": before.get("data_sha256", self.data_sha256)}.items():
            if hasattr(self.config, option) and now.get(option) != was:                # an older run.json has no "inputs"
                changed = "has changed" if now.get(option) else "is gone"
                raise UserError(f"--{option} {getattr(self.config, option)} {changed} since the run in {self.out} began; start "
                                f"again with --overwrite, or name another --out")
        return False

    def begin(self, step):
        """Makes the folder ready for the steps after `step`. A new run replaces an old one (--overwrite) and writes run.json;
        in a resumed run, steps after the checkpoint are run and logged again, so their old rows go. The clock starts here."""
        self.started = time.monotonic()
        self.asked_to_stop = StopSignals(self)
        if ranks.mine() > 0:
            self.first_step = self.step = step
            return
        self.lock = FolderLock.of(self.out)
        if not self.config.resume:
            self._check_unused()                  # a run that began and ended since the first look
            if self.config.overwrite and (self.out / "run.json").exists():
                # Killed at any moment, it must leave a run folder: --overwrite touches no other. Until the old run.json is
                # replaced it is that of an unfinished run, which --resume would take up at its beginning.
                write_json(self.out / "run.json", read_run(self.out) | {"finished": False})
                for old in [self.out / "checkpoints", *self.out.iterdir()]:            # not the folder, which is locked
                    if old.name != "run.json":
                        remove(old)
            remove(self.out / "log.txt")
            self._write_run_json(finished=False)
            return
        for log in (self.out / "metrics.jsonl", self.out / "samples.jsonl"):
            if log.exists():
                write_records(log, [r for r in read_jsonl(log) if r["step"] <= step])
        self.before |= {k: v for row in read_jsonl(self.out / "metrics.jsonl")[-1:] for k, v in row.items() if k in self.before}
        self.first_step = self.step = step
        self.say(f"{self.name} resumes {self.out} after step {step}")

    def _write_run_json(self, finished):
        versions = {p: importlib.metadata.version(p) for p in ("torch", "tiktoken", "numpy", "safetensors")}
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
        write_json(self.out / "run.json", dict(
            script=self.name, finished=finished, options=dataclasses.asdict(self.config), data_sha256=self.data_sha256,
            inputs=self.inputs, device=device, world_size=ranks.count(),
            commit=git_commit(), python=platform.python_version(), **versions))

    def micro_batches(self, items, length=lambda item: item.length):
        """Returns this rank's share of a step's items, in lists of at most --micro_batch_size of similar length. Their order is
        free because a loss is summed over the whole batch and divided by the count of the whole batch."""
        return ranks.split(sorted(ranks.deal(items, length), key=length), len(items), self.micro_batch_size)

    def of_each(self, items, function):
        """Returns function's result for each item, see data.of_each, in micro-batches."""
        return of_each(items, self.micro_batch_size, function)

    def autocast(self):
        """Autocast for --dtype bfloat16; the weights stay float32. Within the outermost context, each weight that is trained is
        rounded once, however many passes there are."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")

    def prepare(self, model, tokenizer):
        """Checks that the model has an embedding for every token id and moves it to the device; --frozen_layers, --compile and
        --gradient_checkpointing act here. Returns the model."""
        trunk = check_fit(model, tokenizer)
        # config.json must name the EOS and pad ids that were really used.
        trunk.config.eos_id, trunk.config.end_ids, trunk.config.pad_id = tokenizer.eos_id, tokenizer.end_ids, tokenizer.pad_id
        freeze_layers(trunk, getattr(self.config, "frozen_layers", 0.0))
        ranks.place(model, self.device, self.config.dtype)
        trunk.checkpointing = getattr(self.config, "gradient_checkpointing", False)
        if self.config.compile:
            trunk.compile_layers()
        return model

    def load_reference(self, folder, tokenizer):
        """Returns the reference policy of a folder, which takes no gradients; UserError if its ids are not the policy's."""
        check_same_ids("--reference", folder, tokenizer)
        return self.prepare(freeze(Transformer.from_pretrained(folder), self.config.dtype), tokenizer)

    @staticmethod
    def due(every, step, total):
        """True if something done every so many steps (0 = never), and once after the last step, is due after `step` steps."""
        return every > 0 and (step % every == 0 or step == total)

    # ---- Logging ----------------------------------------------------------------------------------------------------

    def say(self, line, progress=False):
        """Appends a line to log.txt and prints it. A terminal shows progress in place instead (`log`)."""
        if ranks.mine() == 0:
            with open(self.out / "log.txt", "a", encoding="utf-8") as file:
                print(line, file=file)
        if not (progress and terminal.here()):
            print(line, flush=True)

    def log(self, step, total, metrics, tokens=0):
        """Appends one row to metrics.jsonl and shows progress. step: finished steps; tokens: tokens processed in this step.

        The row also gets `time`, the seconds since begin(), `tokens`, and their ratio `tokens_per_second`. They are sums over
        all parts of a run that was stopped and resumed.
        """
        row = {k: float(v) for k, v in metrics.items()}
        if bad := [k for k, v in row.items() if not math.isfinite(v)]:
            raise NotFinite(f"step {step}: {', '.join(bad)} not finite")
        self.step, self.tokens = step, self.tokens + tokens
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)   # of this part of the run
        whole, count = self.before["time"] + seconds, self.before["tokens"] + self.tokens
        times = {"time": round(whole, 3), "tokens": count, "tokens_per_second": round(count / whole, 3)}
        append_records(self.out / "metrics.jsonl", [{"step": step, **times, **row}])
        if ranks.mine() == 0:
            self.log_elsewhere(step, times | row)
        head, left = f"{self.name} {step}/{total}", int(seconds / max(1, step - self.first_step) * (total - step))
        left, speed = f"{left // 60}:{left % 60:02d} left", f"{self.tokens / seconds:,.0f} tokens/s  " if self.tokens else ""
        if step >= total or step == 1 or now - self.printed > 5:
            self.printed = now
            shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if not k.startswith("eval/"))
            self.say(f"{head}  {shown}  {speed}{left}", progress=True)
        if evals := {k: v for k, v in row.items() if k.startswith("eval/") and not k.endswith("_se")}:
            self.say(f"{head}  " + "  ".join(f"{k} {v:.4g}" for k, v in evals.items()))
        if terminal.here():                       # what a narrow terminal cuts off comes last
            shown = "  ".join(f"{short} {row[k]:.4g}" for k, short in IN_BRIEF.items() if k in row)
            terminal.draw(head, f"  {left}  {shown}  {speed}", last=step >= total)

    def log_elsewhere(self, step, row):
        """Hands a step's row, {name: number}, to TensorBoard; without --tensorboard it does nothing. This is the one place where
        a fork calls a logger of its own. Only the first rank comes here. A step that a resumed run takes again comes again."""
        if self.new_writer is None:
            return
        if self.writer is None:                   # purge_step: what an interrupted run has logged from this step on is void
            self.writer = self.new_writer(self.out / "tensorboard", purge_step=step)
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()                       # a kill loses nothing

    def log_samples(self, step, records):
        """Appends texts to samples.jsonl."""
        append_records(self.out / "samples.jsonl", [{"step": step, **r} for r in records])

    # ---- Checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint(self, step, total, modules, optimizers, state=None):
        """Saves a checkpoint if one is due (--save_every), or if a signal asked the run to stop, which ends it here."""
        asked = ranks.any_of(self.asked_to_stop)
        if self.due(self.config.save_every, step, total) or asked:
            self.save_checkpoint(step, modules, optimizers, state)
        if asked and step < total:
            raise KeyboardInterrupt

    def stop_if_asked(self, step, total):
        """Raises KeyboardInterrupt if a signal asked the run to stop, but not after its last step. Call it when all is saved."""
        if ranks.any_of(self.asked_to_stop) and step < total:
            raise KeyboardInterrupt

    def save_checkpoint(self, step, modules, optimizers, state=None):
        """Writes checkpoints/step-N: weights and optimizer tensors as safetensors, the rest as JSON, and a sha256 of each.
        UserError, and nothing is written, if a number is NaN or infinite. The first rank collects what is sharded."""
        tensors = {name: ranks.shard_again(module).state_dict() for name, module in modules.items()}
        tensors |= {name: {f"{i}.{k}": torch.as_tensor(v) for i, entry in optimizer.state_dict()["state"].items()
                           for k, v in entry.items() if v is not None} for name, optimizer in optimizers.items()}
        tensors = {name: ranks.whole_on_first(found) for name, found in tensors.items()}
        ranks.on_first(self._write_checkpoint, step, tensors, state)

    def _write_checkpoint(self, step, tensors, state):
        for name, found in tensors.items():
            check_finite(found, f"step {step}, {name}")
        with atomic_write(self.out / "checkpoints" / f"step-{step:07d}") as folder:
            folder.mkdir()
            for name, found in tensors.items():
                write_tensors({k: v.contiguous() for k, v in found.items()}, folder / f"{name}.safetensors")
            digests = {p.name: sha256_of(p) for p in folder.glob("*.safetensors")}
            state = dict(step=step, **(state or {}))
            write_json(folder / "state.json", dict(state, sha256=dict(digests, state=digest_of(state))))
        for old in sorted((self.out / "checkpoints").glob("step-*"))[:-2]:
            remove(old)

    def load_checkpoint(self, modules, optimizers):
        """Loads the newest checkpoint in place and returns its state; {"step": 0} without --resume or before the first one."""
        folders = sorted((self.out / "checkpoints").glob("step-*")) if self.config.resume else []
        if not folders:
            return {"step": 0}
        state = checked_state(folders[-1])
        for name, module in modules.items():
            saved = load_file(folders[-1] / f"{name}.safetensors")
            module.load_state_dict({k: ranks.part_like(saved[k], v) for k, v in module.state_dict().items()})
        for name, optimizer in optimizers.items():
            entries, parameters = {}, [p for group in optimizer.param_groups for p in group["params"]]
            for key, tensor in load_file(folders[-1] / f"{name}.safetensors").items():
                index, field = key.split(".", 1)
                like = parameters[int(index)]     # but the number of steps is one for a whole weight
                entries.setdefault(int(index), {})[field] = ranks.part_like(tensor, like) if tensor.dim() else tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        return state

    def finish(self, model, tokenizer):
        """Writes the checkpoint folder that from_pretrained, transformers and vLLM load, then marks the run finished. UserError,
        and nothing is written, if a weight is NaN or infinite, or so large that the model's output is."""
        check_finite({name: ranks.local(p) for name, p in model.named_parameters()}, f"step {self.step}")
        with torch.no_grad():
            output = model(torch.full((2, 2), tokenizer.eos_id, device=self.device))
            output = model.logits(output) if isinstance(model, Transformer) else output
        check_finite({"the model's output": output}, f"step {self.step}")
        model.save_pretrained(self.out)
        if ranks.mine() == 0:
            tokenizer.save(self.out)
        self.done()

    def done(self):
        """Marks the run finished."""
        if self.writer:
            self.writer.close()
        ranks.on_first(self._write_run_json, True)
        self.asked_to_stop.restore()
        self.lock = None
        print(f"{self.name} done: {self.out}", flush=True)


class StopSignals:
    """True once SIGINT, SIGTERM or SIGUSR1 asked a run to stop; for then it ends after its step and saves. Slurm sends the last
    two ahead of the end of a job. A second signal acts as if this object were not there, and so ends the run at once.

    Signals that are ignored stay so. It does nothing outside the main thread, or once the run that it was made for is gone.
    """

    def __init__(self, run):
        self.run, self.signal, self.before = weakref.ref(run), None, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            self.before = {number: handler for number, handler in self.before.items() if handler not in (None, signal.SIG_IGN)}
            for number in self.before:
                signal.signal(number, self.ask)

    def __bool__(self):
        return self.signal is not None

    def ask(self, number, frame):
        self.restore()
        if (run := self.run()) is None:
            signal.raise_signal(number)
            return
        self.signal = number
        print(f"{run.name}: {signal.Signals(number).name}: stops after this step and saves; a second signal stops it at once",
              flush=True)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def new_model(config):
    """Returns (tokenizer, model with random weights) for --init scratch, from the options --tokenizer, --family, --width, ..."""
    tokenizer = load_tokenizer(config.tokenizer)
    width, layers, heads, kv_heads = config.width, config.layers, config.heads, config.kv_heads or config.heads
    if min(width, layers, heads, kv_heads) < 1 or width % heads or heads % kv_heads:
        raise UserError(f"--width {width} --layers {layers} --heads {heads} --kv_heads {kv_heads}: "
                        f"the heads must divide the width, and the kv_heads the heads")
    if kv_heads != heads and config.family in FAMILIES and "kv_heads" not in FAMILIES[config.family].keys:
        raise UserError(f"--kv_heads {kv_heads}: a {config.family} has as many as --heads; --family llama can have fewer")
    shape = ModelConfig.for_family(
        family=config.family, vocab_size=tokenizer.vocab_size, context=config.context, width=width, layers=layers, heads=heads,
        kv_heads=kv_heads, head_dim=width // heads, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    return tokenizer, Transformer(shape, seed_for(config.seed, "model"))


def content_of(value):
    """Returns a sha256 of what an input option names: the fingerprint of its folder or file, of the file of file.py:function and
    of what it imports from beside it, or of each file of NAME=FILE,NAME=FILE. '' if that is not on this machine:
    built-in names and hub names are not compared."""
    return " ".join(found for path in files_of(value) if (found := fingerprint(path)))


def files_of(value):
    """Returns the files and folders on this machine that an input option names."""
    if value in ("", "scratch", "reviews", "gold", "given"):
        return []
    file = re.sub(r"(\.py):\w+$", r"\1", value)
    if file != value and Path(file).is_file():
        return with_imports(Path(file))
    names = [file] if Path(file).exists() else named_files(file).values()
    return [Path(name) for name in names if Path(name).exists()]


def with_imports(file):
    """Returns a reward file and the files of its folder that it imports, itself or through others."""
    found, todo, folder = [], [file], file.parent
    while todo:
        found.append(file := todo.pop(0))
        try:
            nodes = list(ast.walk(ast.parse(file.read_bytes())))
        except (SyntaxError, ValueError, OSError):                                     # the run itself will say so
            continue
        for node in nodes:
            names = [alias.name for alias in getattr(node, "names", ())] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            base = folder
            if isinstance(node, ast.ImportFrom):
                base = file.parents[node.level - 1] if node.level else folder
                names = [f"{node.module}.{name}" for name in names] if node.module else names
            for parts in (name.split(".") for name in names):
                for path in (base.joinpath(*parts[:n]) for n in range(1, len(parts) + 1)):
                    todo += [f for f in (path.with_name(f"{path.name}.py"), path / "__init__.py")
                             if f.is_file() and f not in (*found, *todo)]
    return found


def checked_state(folder):
    """Reads a checkpoint's state.json and compares each file's sha256: safetensors would load a flipped bit silently."""
    def damaged(file):
        return UserError(f"{file} is damaged: delete {folder} to resume from the checkpoint before it")
    try:
        state = read_json(folder / "state.json")
        digests = state.pop("sha256")
        intact = digests.pop("state") == digest_of(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise damaged(folder / "state.json")
    for name, digest in digests.items():
        file = folder / name
        if not file.exists() or sha256_of(file) != digest:
            raise damaged(file)
    return state


def digest_of(state):
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def summary_writer():
    """Returns TensorBoard's SummaryWriter; UserError if it is not installed. It writes in a thread, and an error there, such as a
    full disk, is raised at the next call: so the thread's traceback is not shown."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the extra `tensorboard` (pip install -e '.[tensorboard]')")
    before = threading.excepthook
    threading.excepthook = lambda failed: type(failed.thread).__module__.startswith("tensorboard.") or before(failed)
    return SummaryWriter


def git_commit():
    """Commit of the running code, with + if files differ from it; '' outside a checkout."""
    def git(*args):
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10).stdout.strip()
    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
