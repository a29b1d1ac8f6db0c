"""Rewards: what --reward names, as a callable (prompts, responses, records) -> float32 tensor [N].

    gold                 the built-in task's true reward
    FOLDER or hub name   a reward model, trained by train_rm.py or by other software
    file.py:function     your own function of texts, and of your data's columns
"""

import contextlib
import copy
import functools
import importlib.util
import inspect
import itertools
import math
import os
import sys
import traceback
from pathlib import Path

import torch

from nanorlhf import ranks, reviews
from nanorlhf.data import Example, collate, decode_response, encode_prompt, encode_response, of_each
from nanorlhf.errors import UserError, one_line
from nanorlhf.files import local_folder
from nanorlhf.formats.records import columns_of
from nanorlhf.model import RewardModel, check_fit, freeze
from nanorlhf.tokenizer import tokenizer_of


def reads_text(spec):
    """True if a reward is a function of texts, not a model."""
    return spec == "gold" or ".py:" in spec


def load_reward(spec, tokenizer, device, records=(), data="", batch_size=0, dtype="float32"):
    """Returns the reward that `spec` names: a callable (prompts, responses, records) -> float32 tensor [N].

    prompts, responses: N lists of token ids of the policy's `tokenizer`; records: the N records they belong to (None: the
    prompts are decoded, which is wrong for conversations). `records` here are those of `data`, a file's name, that it will
    read: UserError if they lack a column that the function needs. A model reads batch_size rows at a time (0: 128), with dtype
    as --dtype.
    """
    if spec == "gold":
        return TextReward(lambda prompts, completions: list(map(reviews.gold_reward, prompts, completions)), spec, tokenizer)
    if ".py:" in spec:
        function, module = user_function(spec)
        reward = TextReward(function, spec, tokenizer, module)
    else:
        reward = ModelReward(spec, tokenizer, device, batch_size or 128, dtype)
    reward.check_columns(records, data)
    return reward


class ModelReward:
    """A reward model. With the policy's tokenizer and chat template it reads exactly what the policy wrote; otherwise it reads
    the texts in its own tokens."""

    def __init__(self, spec, tokenizer, device, batch_size, dtype):
        try:
            folder = local_folder(spec)
        except UserError as error:
            raise UserError(f"--reward {spec}: neither `gold`, nor file.py:function, nor a reward model: {error}")
        if not (folder / "config.json").exists():
            raise UserError(f"--reward {spec}: not a reward-model folder (python train_rm.py makes one), `gold` or "
                            f"file.py:function")
        self.model, self.own = freeze(RewardModel.from_pretrained(folder), dtype), tokenizer_of(folder, tokenizer)
        check_fit(self.model, self.own)
        ranks.place(self.model, device, dtype)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        self.spec, self.policy, self.device, self.batch_size = spec, tokenizer, device, batch_size
        self.same = reads_alike(self.own, tokenizer)

    def check_columns(self, records, data):
        """A model reads prompts and responses only."""

    @torch.no_grad()
    def __call__(self, prompts, responses, records=None):
        if not self.same:
            prompts, responses = in_own_tokens(self.own, self.model.config.context, self.policy, prompts, responses, records)
        examples = [Example(p + r, len(p)) for p, r in zip(prompts, responses)]

        def score(part):
            batch = collate(part, self.own.pad_id, self.device)
            with self.autocast:
                return self.model.score(batch.tokens, batch.lengths).tolist()
        scores = torch.tensor(of_each(examples, self.batch_size, score))
        if not torch.isfinite(scores).all():
            raise UserError(f"--reward {self.spec}: the reward model gives {scores[~torch.isfinite(scores)][0]}")
        return scores


def reads_alike(own, policy):
    """Returns whether a model with the tokenizer `own` reads the policy's ids as the policy wrote them."""
    return own.same_ids(policy) and own.chat_template == policy.chat_template


def in_own_tokens(own, context, policy, prompts, responses, records):
    """Returns (prompts, responses) as ids of the tokenizer `own`, cut to `context` tokens, from ids of the tokenizer `policy`."""
    texts, encoded = texts_of(prompts, records, policy), []
    for response, text in zip(responses, texts):
        ids = encode_response(own, decode_response(policy, response, text), text)
        ended = response[-1:] and response[-1] in policy.end_ids
        encoded.append(ids if ended else ids[:-1])                      # a truncated response has no EOS
    return [encode_prompt(own, t, max(1, context - len(r))) for t, r in zip(texts, encoded)], encoded


class TextReward:
    """A function of texts, in TRL's form: function(prompts, completions, answer, **kwargs) -> list of numbers. All arguments are
    lists with one entry per response. `answer` stands for any column of the data, and **kwargs takes all the others;
    `completion_ids` are the responses as token ids. Texts are strings: a conversation is its transcript. All values are copies,
    so the function may change them. The result may also be a tensor, an array or an iterator; a number may be of any kind, or in
    a list, row or array of its own ([N, 1]).

    The first two parameters get prompts and completions, whatever their names. As in TRL, a function may also name only some of
    prompts, completions and completion_ids, in any order, and then everything is passed by name.
    """

    def __init__(self, function, spec, tokenizer, module=None):
        self.function, self.spec, self.tokenizer, self.module = function, spec, tokenizer, module
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):           # some built-in functions have no signature
            parameters = {}
        kinds = {p.kind for p in parameters.values()}
        positional = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
                 and n not in getattr(function, "keywords", ())}        # what functools.partial has fixed stays as it is
        # (*args, **kwargs) is a wrapper around a function that is not known: it gets the two texts and nothing else.
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds and (
            bool(positional) or inspect.Parameter.VAR_POSITIONAL not in kinds)
        self.by_name = positional[1:2] != ["completions"] and bool(
            {"completions", "completion_ids"} & named.keys() or self.takes_all and len(positional) < 2)
        self.taken = {"prompts", "completions", "completion_ids", "self", *([] if self.by_name else positional[:2])}
        self.names = set(named)
        self.needed = [n for n, p in named.items() if n not in self.taken and p.default is p.empty]
        self.columns = dict.fromkeys(self.needed)                       # names of all columns in the data seen so far

    def check_columns(self, records, data):
        """Raises UserError if the function needs a column that the records of `data`, a file's name, lack."""
        columns = columns_of(records)
        for name in self.needed if records else ():
            if name not in columns:
                raise UserError(f"reward {self.spec} needs a column {name!r}; {data} has {', '.join(columns)}")
        self.columns |= dict.fromkeys(columns)

    def __call__(self, prompts, responses, records=None):
        """The first rank calls the function with all rows, as a single process would."""
        return ranks.on_first(self.scores, prompts, responses, records)

    def scores(self, prompts, responses, records):
        texts = texts_of(prompts, records, self.tokenizer)
        given = {"prompts": texts, "completion_ids": responses,
                 "completions": [decode_response(self.tokenizer, r, t) for r, t in zip(responses, texts)]}
        columns = dict.fromkeys(self.columns, [None] * len(texts)) | columns_of(records or ())
        columns = {n: v for n, v in columns.items() if n not in self.taken} | {
            n: v for n, v in given.items() if self.by_name or n == "completion_ids"}
        columns = {n: list(map(copy.deepcopy, v)) for n, v in columns.items() if n in self.names or self.takes_all}
        if self.module:
            come_first(self.module)
        try:
            with process_kept(self.module):
                result = self.function(*([] if self.by_name else [list(texts), given["completions"]]), **columns)
                values = list_of(result, len(texts) + 1)
        except (Exception, SystemExit) as error:  # the user's code, an iterator's too: say where in it, in one line
            raise UserError(f"--reward {self.spec}: {_where(error)}")
        if inspect.iscoroutine(result):
            result.close()
            raise UserError(f"--reward {self.spec}: an async function is not supported")
        if values is None:
            raise UserError(f"--reward {self.spec}: did not return a list of numbers")
        if len(values) != len(texts):
            found = "more" if len(values) > len(texts) else len(values)
            raise UserError(f"--reward {self.spec}: {len(texts)} finite numbers expected, got {found}")
        numbers = list(map(number_of, values))
        for i, number in enumerate(numbers):
            if number is None or not math.isfinite(number):
                what = "did not return a list of numbers" if number is None else "finite numbers expected"
                raise UserError(f"--reward {self.spec}: {what}, got {shown(values[i])} for response {i}")
        return torch.tensor(numbers)


def list_of(values, most):
    """Returns what a reward function gave as a list: a list, a tensor on any device, an array, or the first `most` items of an
    iterator. None if it is nothing of that kind."""
    if hasattr(values, "tolist"):
        values = values.tolist()                  # one transfer from a GPU, not one per number
    if isinstance(values, (str, bytes, dict, set)) or not hasattr(values, "__iter__"):
        return None
    return list(itertools.islice(values, most))


def number_of(value):
    """Returns the float of a number of any kind, also of one in a list or an array of its own; infinity if float32 does not hold
    it, and None if it is no number."""
    value = value.tolist() if hasattr(value, "tolist") else value
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0].tolist() if hasattr(value[0], "tolist") else value[0]
    try:
        number = None if isinstance(value, (str, bytes)) else float(value)
    except OverflowError:                         # an integer beyond 1e308
        number = math.inf
    except (TypeError, ValueError):
        number = None
    return math.inf if number is not None and abs(number) > torch.finfo(torch.float32).max else number


def shown(value):
    """A value as one line."""
    try:
        return one_line(repr(value))
    except ValueError:                            # an integer of more than 4300 digits
        return f"a huge {type(value).__name__}"


def texts_of(prompts, records, tokenizer):
    """The prompts as text: as the records hold them, else decoded."""
    return [r["prompt"] for r in records] if records else [tokenizer.decode(p) for p in prompts]


def _where(error):
    """An exception in one line: what it is, and the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(frame.filename).name}:{frame.lineno})"


FOLDERS, FIRST = {}, []                           # {module of a reward file: its folder}; the folder put first on sys.path
WORKING = {}                                      # {module of a reward file: the working folder that it went to}


@contextlib.contextmanager
def process_kept(module):
    """Takes back what a reward file's code changes for the whole process: the working folder, in which --out and other paths
    begin, and whether torch records gradients and in which type it makes numbers. The file finds its working folder again."""
    here, dtype, gradients = os.getcwd(), torch.get_default_dtype(), torch.is_grad_enabled()
    with contextlib.suppress(OSError):            # it may be gone, as a temporary one
        os.chdir(WORKING.get(module, here))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if (there := os.getcwd()) != here:
                WORKING[module] = there
        os.chdir(here)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


def user_function(spec):
    """Returns (function, its module) of "file.py:function"."""
    file, name = spec.rsplit(":", 1)
    if not Path(file).is_file():
        raise UserError(f"--reward {spec}: no file {file}")
    try:
        module = user_module(Path(file).resolve(), Path(file).read_bytes())
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {spec}: {_where(error)}")
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {spec}: {file} has no function {name}")
    return getattr(module, name), module


@functools.cache
def user_module(file, source):
    """Runs a reward file, once per content, as a module that Python finds by its name, because dataclasses look it up and a
    process of a pool imports it. A file called like a loaded module, such as math.py, gets another name (and no spawned pool)."""
    look_first_into(folder := str(file.parent))
    known = sys.modules.get(file.stem)
    taken = known is not None and known not in FOLDERS and getattr(known, "__file__", None) != str(file)
    name = f"reward_{file.stem}" if taken else file.stem
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, file))
    sys.modules[name], FOLDERS[module] = module, folder
    try:
        with process_kept(module):
            exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))
    except BaseException:
        sys.modules.pop(name, None)
        del FOLDERS[module]
        raise
    return module


def come_first(module):
    """Gives a reward file its name and its folder back, which another reward may have taken since."""
    if sys.modules.get(module.__name__) is not module or FIRST != [FOLDERS[module]]:
        look_first_into(FOLDERS[module])
        sys.modules[module.__name__] = module


def look_first_into(folder):
    """Puts a reward file's folder first on sys.path, where Python puts a script's, and leaves it there for later imports, in
    place of another reward's. Modules that another reward imported from its own folder are forgotten if this one has modules
    of the same names."""
    for other in FIRST:
        if other in sys.path:
            sys.path.remove(other)
    sys.path.insert(0, folder)
    FIRST[:] = [folder]
    others, here = {f for f in FOLDERS.values() if f != folder}, {p.stem for p in Path(folder).iterdir()}
    for name in [n for n in sys.modules if n.partition(".")[0] in here]:
        file, places = getattr(sys.modules[name], "__file__", None), [Path(other, *name.split(".")) for other in others]
        if any(file in (f"{p}.py", str(p / "__init__.py")) or not file and p.is_dir() for p in places):
            del sys.modules[name]
