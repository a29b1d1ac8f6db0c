"""The command line of a script: its Config dataclass, one field per option, and back."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import inspect
import itertools
import os
import re
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

from nanorlhf import ranks
from nanorlhf.errors import UserError, one_line
from nanorlhf.files import read_json, read_jsonl

HOW_TO_BEGIN = ("out", "resume", "overwrite")     # never taken from the run that --resume continues


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        known = [name for action in self._actions for name in action.option_strings]
        meant = [difflib.get_close_matches(word, known, 1, 0.75) for word in re.findall(r"--\w+", message)]
        if message.startswith("unrecognized arguments: --") and any(meant):
            message += f"; did you mean {' or '.join(sum(meant, []))}?"
        elif message.startswith("unrecognized arguments") and " " in self.prog:
            message += f"; want {self.prog} [options]"
        raise SystemExit(f"error: {message} (--help lists the options)")


def parse_options(Config, description="", argv=None, prog=None):
    """Command line -> Config. Each field is an option, the comment behind it is its help, and a comment line above fields is
    their heading in --help. --lr 1e-5 and --lr=1e-5 both work.

    Config.renamed, {old option: new option}, keeps old names working; each use prints one line that says the new name. prog: the
    command and what comes before its options, for --help.
    """
    help_of, heading_of, heading = {}, {}, "Options"
    for line in inspect.getsource(Config).split("\n"):
        if match := re.match(r"    # (.+)$", line):
            heading = match[1]
        elif match := re.match(r"    (\w+):[^#]*#\s*(.*)$", line):
            help_of[match[1]], heading_of[match[1]] = match[2], heading
    renamed = getattr(Config, "renamed", {})

    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    headings = {heading: parser.add_argument_group(heading) for heading in heading_of.values()}
    for field in dataclasses.fields(Config):
        group = headings.get(heading_of.get(field.name), parser)
        text = f"{help_of.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        if field.type is bool:
            kind = dict(type=_boolean, nargs="?", const=True, metavar="BOOL")
        else:
            kind = dict(type=str if get_origin(field.type) is Literal else field.type, metavar=metavar_of(field))
        group.add_argument(f"--{field.name}", default=field.default, help=text, **kind)
        for old in (old for old, new in renamed.items() if new == field.name):
            parser.add_argument(f"--{old}", dest=field.name, default=field.default, help=argparse.SUPPRESS, **kind)
    given = parser.parse_args(argv)
    flags = {word.split("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
    for old, new in renamed.items():
        if f"--{old}" in flags:
            if f"--{new}" in flags:
                parser.error(f"--{old} is the old name of --{new}: give one of them")
            print(f"--{old} is now --{new}", file=sys.stderr)
    if getattr(given, "resume", False):           # a resumed run keeps its original options
        try:
            options = read_options(given.out, Config)
        except UserError as error:
            raise SystemExit(f"error: {error}")
        parser.set_defaults(**{k: v for k, v in options.items() if k not in HOW_TO_BEGIN})
        given = parser.parse_args(argv)
    return Config(**vars(given))


def leading_words():
    """Returns the words of the command line before its first option: files, folders or names that a program works on."""
    return list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))


def metavar_of(field):
    """What --help shows as an option's value: its type, or the allowed words."""
    return "|".join(get_args(field.type)) if get_origin(field.type) is Literal else field.type.__name__.upper()


def read_options(out, Config):
    """Options saved in a run folder's run.json that Config still has, by their new names; {} if there is no run.json."""
    saved = read_run(out).get("options", {})
    saved = {getattr(Config, "renamed", {}).get(name, name): value for name, value in saved.items()}
    return {f.name: saved[f.name] for f in dataclasses.fields(Config) if f.name in saved}


def read_run(out):
    """Returns the run.json of a run folder, {} if there is none; UserError if it is damaged."""
    file = Path(out) / "run.json"
    try:
        run = read_json(file) if file.exists() else {"options": {}}
        whole = isinstance(run["options"], dict) and isinstance(run.get("inputs") or {}, dict)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged")
    return run


def _boolean(text):
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


RANGES = {                        # {interval: the numeric options that lie in it}; nan and inf lie in none
    "[0, 1e9]": "micro_batch_size max_steps warmup_steps eval_every save_every limit max_prompt_length top_k "
                "num_eval_prompts resample_every first_words",
    "[1, 1e9]": "batch_size response_length max_new_tokens num_ppo_epochs num_mini_batches num_prompts diversity_prompts",
    "0 or [2, 1e9]": "max_length",                # a token is predicted from another one
    "[1, 1e5]": "width num_samples n", "[0, 1e5]": "bon", "[0, 1e3]": "kv_heads processes",
    "[1, 1e6]": "context seeds", "[1, 1e3]": "layers heads",
    "[0, 9e18]": "seed",
    "[0, inf)": "lr value_lr",
    "[0, 1e6]": "weight_decay prior_precision max_grad_norm kl_coef kl_target vf_coef rrhf_weight length_penalty "
                "diversity_penalty",
    "(0, 1e6]": "epochs beta cliprange cliprange_value", "(0, inf)": "kl_horizon",
    "[1e-20, 1]": "adam_eps", "[1e-3, 1e3]": "scale",
    "[-1e6, 1e6]": "missing_eos_penalty label_temperature",
    "0 or [1e-3, 1e3]": "temperature",
    "[0, 1)": "eval_fraction", "[0, 0.5)": "label_smoothing", "[0, 1]": "gamma lam alpha frozen_layers", "(0, 1]": "top_p"}


INTERVAL_OF = {option: interval for interval, options in RANGES.items() for option in options.split()}


def lies_in(value, interval):
    """True if a number lies in an interval such as "[0, 1)", or in one of several joined by " or "; a single number is one."""
    def inside(part):
        low, high = map(float, part.strip("[]()").split(", ")) if "," in part else (float(part), float(part))
        return low <= value <= high and (value > low or part[0] != "(") and (value < high or part[-1] != ")")
    return any(map(inside, interval.split(" or ")))


def check_options(config):
    """Raises UserError for an option whose value has no meaning: not one of its words, or a number out of range.

    RANGES holds the ranges. A Config may declare others in its dict `ranges`, {option: interval}. An option in neither must
    be finite, and at least 0 unless its default is negative.
    """
    interval_of = INTERVAL_OF | getattr(config, "ranges", {})
    for field in dataclasses.fields(config):
        words, value = get_args(field.type), getattr(config, field.name)
        if words and value not in words:
            raise UserError(f"--{field.name} {value}: not one of {', '.join(words)}")
        if field.type in (int, float):
            default = "(-inf, inf)" if field.default is not dataclasses.MISSING and field.default < 0 else "[0, inf)"
            check_number(field.name, value, field.type, interval_of.get(field.name, default))


def check_number(option, value, kind, interval):
    """Raises UserError unless an option's value is of this kind, int or float, and lies in the interval."""
    if not isinstance(value, (int, kind)) or not lies_in(value, interval):
        raise UserError(f"--{option} {value}: must be {'an integer' if kind is int else 'a number'} in {interval}")


def named_files(text):
    """"NAME=FILE,NAME=FILE" -> {name: file}; a file without a name is called by its stem. The path of a file that exists may
    hold commas and equals signs itself."""
    found, parts = {}, text.split(",") if text else []
    while parts:
        for n in range(len(parts), 0, -1):        # the longest path that exists
            name, file = name_and_file(",".join(parts[:n]))
            if os.path.isfile(file) or n == 1:
                break
        name, parts = name or Path(file).stem, parts[n:]
        if file and found.setdefault(name, file) != file:
            raise UserError(f"{found[name]} and {file} would both be called {name}: name them, NAME=FILE,NAME=FILE")
    return found


def name_and_file(text):
    """"NAME=FILE" -> (name, file), and "FILE" -> ("", file). It is split at the first = behind which a file's path begins. A name
    holds no comma."""
    ends = [m.start() for m in re.finditer("=", text) if "," not in text[:m.start()]]
    pairs = [("", text)] + [(text[:i], text[i + 1:]) for i in ends]
    return next((pair for pair in pairs if os.path.isfile(pair[1])), pairs[-1])


def how_to_continue(config):
    """Says what a run that was stopped has saved, and the command that continues it."""
    out = Path(config.out)
    if not getattr(config, "resume", False) and read_options(out, type(config)) != dataclasses.asdict(config):
        return "nothing of this run was saved: give the same command again"
    command = shlex.join(["python", sys.argv[0], "--out", str(out), "--resume"])
    if saved := sorted(out.glob("checkpoints/step-*")):
        return f"continue after step {int(saved[-1].name.removeprefix('step-'))} with: {command}"
    if prompts := len(read_jsonl(out / "drawn.jsonl")):
        return f"continue after {prompts} prompts with: {command}"
    return f"no checkpoint was saved yet; to start from the beginning: {command}"


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextlib.contextmanager
def interrupted_by_signals():
    """Within it SIGTERM and SIGUSR1, which Slurm sends ahead of the end of a job, raise KeyboardInterrupt as SIGINT does."""
    here = threading.current_thread() is threading.main_thread()
    taken = [number for number in STOP_SIGNALS if here and signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def one_line_errors(options, go_on):
    """Turns an error that the user can fix into one line on stderr and the exit code 1. options: the parsed command line;
    go_on(): what the user can do after an interruption."""
    try:
        with interrupted_by_signals():
            yield
        ranks.leave()
    except UserError as error:
        raise SystemExit(f"{who()}error: {error}")
    except OSError as error:                      # a full disk, a folder that may not be written to
        more = f"; make room first; {go_on()}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise SystemExit(f"{who()}error: {error}{more}")
    except KeyboardInterrupt:
        raise SystemExit(f"{who()}interrupted; {go_on()}")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        smaller = [o for o in ("micro_batch_size", "batch_size", "bon", "num_samples") if hasattr(options, o)][:2]
        raise SystemExit(f"{who()}error: out of memory; lower {' or '.join('--' + o for o in smaller)} ({one_line(error)})")


def who():
    """Names this process if there are several."""
    return f"rank {ranks.mine()}: " if ranks.count() > 1 else ""


def main(Config, run, description):
    """Entry point of a script: reads the options and calls run(config)."""
    config = parse_options(Config, description)
    with one_line_errors(config, lambda: how_to_continue(config)):
        run(config)
