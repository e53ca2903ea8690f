"""Options: fields of frozen dataclasses. The command line is built from them.

A dictionary {option: value} starts with the options of the command line. A preset or the checkpoint
of an earlier run completes it."""

import os
from argparse import SUPPRESS, ArgumentTypeError
from dataclasses import asdict, field, fields
from pathlib import Path

from runtime.arguments import Parser
from runtime.checkpoint import DAMAGE, read_checkpoint
from runtime.files import explain_errors


def option(default, help, low=0, below=2**31, choices=()):
    """A field with a help text and limits: low <= number < below, or one of the choices."""
    limits = {"help": help, "low": low, "below": below, "choices": choices}
    return field(default=default, metadata=limits)


def check_options(config):
    """Raises ValueError for an option that has a type unlike its default, or exceeds limits. Whole
    numbers may stand for others, and lists for tuples: JSON has no tuples."""
    for f in fields(config):
        value = getattr(config, f.name)
        if (type(f.default), type(value)) in ((float, int), (tuple, list)):
            value = type(f.default)(value)
            object.__setattr__(config, f.name, value)  # the way to change a frozen dataclass
        check_type(f.name, value, type(f.default))
        check_limits(f.name, value, f.metadata)


def check_type(name, value, kind):
    if type(value) is not kind:
        raise ValueError(f"--{name}={value!r}: must be of type {kind.__name__}")
    if kind is tuple:
        for item in value:
            if type(item) is not int:
                raise ValueError(f"--{name}={value!r}: must hold whole numbers")


def check_limits(name, value, limits):
    low = limits["low"]
    below = limits["below"]
    choices = limits["choices"]
    if type(value) in (int, float) and not low <= value < below:
        raise ValueError(f"--{name}={value}: must be at least {low} and below {below}")
    if choices and value not in choices:
        raise ValueError(f"--{name}={value}: must be one of {', '.join(choices)}")


def make_configs(options, *classes):
    """{option: value} -> a config of each class. Raises ValueError for unknown or invalid ones."""
    known = set()
    configs = []
    for config_class in classes:
        names = {f.name for f in fields(config_class)}
        own = {name: value for name, value in options.items() if name in names}
        configs.append(config_class(**own))
        known |= names
    for name in options:
        if name not in known:
            raise ValueError(f"--{name}: there is no such option")
    return configs


# --- command line ---------------------------------------------------------------------


NANOGPT = {  # its options that train.py does not have, and what to do instead
    "always_save_checkpoint": "each evaluation is followed by a checkpoint",
    "backend": "leave it out; torchrun works without it",
    "bias": "leave it out; the model has no biases",
    "decay_lr": "for a constant rate, give --min_lr the value of --learning_rate",
    "dropout": "leave it out; there is no dropout",
    "eval_only": "log.jsonl has the losses; python sample.py --recall asks questions; "
    "--init_from=RUN --dataset=OTHER --max_iters=1 prints RUN's loss on OTHER ('before')",
    "init_from=resume": "continue a run with --resume --out_dir=FOLDER",
    "init_from=scratch": "leave it out",
    "lr_decay_iters": "the rate decays over --max_iters",
    "wandb_log": "leave it out; python bench/curves.py FOLDER draws the curves of log.jsonl",
}


def parse_command_line(argv, description, classes, presets=()):
    """argv -> {option: value} of the given options. presets: names for --preset. Exits with 2 on
    an option that cannot be parsed, naming it."""
    parser = Parser(description, usage="%(prog)s [--option=value ...]", argument_default=SUPPRESS)
    if presets:
        help = f"a named run, written out in presets.py: {', '.join(presets)}"
        parser.add_argument("--preset", choices=presets, help=help, metavar="NAME")
    for config_class in classes:
        for f in fields(config_class):
            if f.name not in ("vocab_size", "separator"):  # the dataset sets them
                add_option(parser, f)
    given, unknown = parser.parse_known_args(argv)
    if presets:
        explain_nanogpt(parser, argv)
    if unknown:
        parser.refuse(unknown[0])
    return vars(given)


def explain_nanogpt(parser, argv):
    """Exit with 2 on nanoGPT's habits, and say what to do here."""
    for word in argv:
        if word.endswith(".py") and not word.startswith("-"):
            parser.error(f"{word}: config files are not read; give --preset=NAME, --option=value")
        text = word.removeprefix("--")
        for option, way_out in NANOGPT.items():
            if text == option or text.startswith(f"{option}="):
                parser.error(f"{word}: {way_out}")
        if text.startswith("init_from=gpt2"):
            parser.error(f"{word}: OpenAI's weights cannot be loaded; give the folder of a run")
        if text.startswith("wandb_"):
            parser.error(f"{word}: this is nanoGPT's; there is no such option here")


def add_option(parser, f):
    choices = f.metadata["choices"]
    notes = list(choices)
    if f.default not in ("", ()):
        notes.append(f"default: {f.default}")
    help = f.metadata["help"]
    if notes:
        help += f" ({', '.join(notes)})"
    help = help.replace("%", "%%")
    settings = {"help": help, "metavar": "", "type": type(f.default)}
    if choices:
        settings["type"] = str.lower
    elif type(f.default) is str:
        settings["type"] = os.path.expanduser  # the shell does not expand the ~ of --out_dir=~/x
    elif type(f.default) is tuple:
        settings["type"] = whole_numbers
    elif type(f.default) is bool:
        settings["type"] = truth_value
        settings["nargs"] = "?"  # --resume means --resume=true
        settings["metavar"] = "true"
        settings["const"] = True
    parser.add_argument(f"--{f.name}", **settings)


def whole_numbers(text):
    """For argparse: "2,6,10" -> (2, 6, 10)"""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be whole numbers, such as 2,6,10") from None


def truth_value(text):
    """For argparse."""
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ArgumentTypeError(f"{text}: must be true or false")
    return values[text.lower()]


# --- presets, and runs that continue --------------------------------------------------


def options_from_preset(given, presets, default):
    """The options of a new run: its preset's, overridden by the given ones."""
    name = given.get("preset", default)
    options = {"out_dir": f"out/{name}", **presets[name], **given}
    options.pop("preset", None)
    return options


def options_to_resume(given, classes, default):
    """The options of a resumed run: those in its checkpoint, overridden by the given ones. The
    model, the seed and the batch must stay."""
    refuse_preset(given, "--resume")
    out_dir = given.get("out_dir", f"out/{default}")
    saved = saved_options(out_dir, classes)
    saved["overwrite"] = False
    if given.get("init_from", saved["init_from"]) != saved["init_from"]:
        way_out = "to continue a run, name it with --out_dir"
        raise ValueError(f"--init_from starts a new run, --resume does not; {way_out}")
    kept = ("seed", "batch_size", "gradient_accumulation_steps")
    check_kept(kept, given, saved, classes, out_dir)
    return {**saved, "out_dir": out_dir, **given}


def options_to_finetune(given, classes):
    """The options of a run that finetunes another one, init_from: the other run's, overridden by
    the given ones. The model must stay. The other run's dataset becomes the background."""
    refuse_preset(given, "--init_from")
    saved = saved_options(given["init_from"], classes)
    saved["background"] = saved["dataset"]
    saved["out_dir"] = "out/finetuned"
    if "dataset" in given:
        saved["out_dir"] = f"out/{Path(given['dataset']).name}-finetuned"
    saved["resume"] = False
    saved["overwrite"] = False
    saved["memory_parallel"] = 1
    check_kept((), given, saved, classes, given["init_from"])
    return {**saved, **given}


def refuse_preset(given, option):
    if "preset" in given:
        way_out = "leave out --preset, and give only options that change"
        raise ValueError(f"--preset: {option} takes the options of the earlier run; {way_out}")


def saved_options(folder, classes):
    """Read all options of the run in a folder."""
    path = Path(folder, "ckpt.pt")
    checkpoint = read_checkpoint(path)
    with explain_errors(f"{path} has no options that fit", DAMAGE):
        options = {**checkpoint["train_config"], **checkpoint["model_config"]}
        return all_values(make_configs(options, *classes))


def all_values(configs):
    options = {}
    for config in configs:
        options.update(asdict(config))
    return options


def check_kept(names, given, saved, classes, folder):
    """Raises ValueError if given options change one of names, or an option of the model."""
    model_class = classes[1]
    wanted = {**saved, **given}
    if "mem_count" in given and "mem_layers" not in given:
        wanted["mem_layers"] = ()  # saved mem_layers would override mem_count
    try:
        values = all_values(make_configs(wanted, *classes))
    except ValueError:  # the given options do not fit the saved ones
        values = wanted
    for name in [*names, *(f.name for f in fields(model_class))]:
        if name in given and values[name] != saved[name]:
            keeps = f"the run in {folder} keeps --{name}={saved[name]}"
            raise ValueError(f"--{name}={given[name]}: {keeps}; leave it out")
