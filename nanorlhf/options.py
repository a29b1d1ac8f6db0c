"""The command line of a script: its Config dataclass, one field per option, and back."""

import argparse
import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

from nanorlhf.errors import UserError

HOW_TO_BEGIN = ("out", "resume", "overwrite")     # never taken from the run that --resume continues


def parse_options(Config, description="", argv=None):
    """Command line -> Config. Each field is an option, the comment behind it is its help, and a comment line above fields is
    their heading in --help. --lr 1e-5 and --lr=1e-5 both work.

    Config.renamed, {old option: new option}, keeps old names working; each use prints one line that says the new name.
    """
    help_of, heading_of, heading = {}, {}, "Options"
    for line in inspect.getsource(Config).split("\n"):
        if match := re.match(r"    # (.+)$", line):
            heading = match[1]
        elif match := re.match(r"    (\w+):[^#]*#\s*(.*)$", line):
            help_of[match[1]], heading_of[match[1]] = match[2], heading
    renamed = getattr(Config, "renamed", {})

    class OneLineParser(argparse.ArgumentParser):
        def error(self, message):
            raise SystemExit(f"error: {message} (--help lists the options)")

    parser = OneLineParser(description=description, allow_abbrev=False,
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


def metavar_of(field):
    """What --help shows as an option's value: its type, or the allowed words."""
    return "|".join(get_args(field.type)) if get_origin(field.type) is Literal else field.type.__name__.upper()


def read_options(out, Config):
    """Options saved in a run folder's run.json that Config still has, by their new names; {} if there is no run.json."""
    file = Path(out) / "run.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))["options"] if file.exists() else {}
        saved = {getattr(Config, "renamed", {}).get(name, name): value for name, value in saved.items()}
        return {f.name: saved[f.name] for f in dataclasses.fields(Config) if f.name in saved}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file} is damaged")


def _boolean(text):
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


MINIMUM = dict(batch_size=1, micro_batch_size=0, max_steps=0, limit=0, max_length=0, max_prompt_length=0, response_length=1,
               num_ppo_epochs=1, num_mini_batches=1, warmup_steps=0, resample_every=0)     # of options that count something


def check_options(config):
    """Raises UserError for an option whose value has no meaning: not one of its words, or out of range."""
    for field in dataclasses.fields(config):
        words, value = get_args(field.type), getattr(config, field.name)
        if words and value not in words:
            raise UserError(f"--{field.name} {value}: not one of {', '.join(words)}")
    for option, minimum in MINIMUM.items():
        if (value := getattr(config, option, minimum)) < minimum:
            raise UserError(f"--{option} {value}: must be at least {minimum}")
    for option, end in (("eval_fraction", 1), ("label_smoothing", 0.5)):
        if not 0 <= getattr(config, option, 0.0) < end:
            raise UserError(f"--{option} {getattr(config, option)}: must lie in [0, {end})")
    for option in ("epochs", "beta", "top_p"):
        if getattr(config, option, 1.0) <= 0:
            raise UserError(f"--{option} {getattr(config, option)}: must be above 0")


def named_files(text):
    """"NAME=FILE,NAME=FILE" -> {name: file}; a file without a name is called by its stem."""
    pairs = [part.rpartition("=") for part in text.split(",") if part]
    return {name or Path(file).stem: file for name, _, file in pairs}


def main(Config, run, description):
    """Entry point of a script: reads the options and calls run(config). An error that the user can fix is one line on stderr,
    and the exit code is 1."""
    config = parse_options(Config, description)
    try:
        run(config)
    except (UserError, OSError) as error:         # OSError: a full disk, a folder that may not be written to
        raise SystemExit(f"error: {error}")
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; continue with: {Path(sys.argv[0]).name} ... --out {config.out} --resume")
    except torch.OutOfMemoryError as error:
        raise SystemExit(f"error: out of memory; lower --micro_batch_size ({str(error).splitlines()[0]})")
