"""Options: fields of frozen dataclasses, from which the command line is made."""

from dataclasses import field, fields


def option(default, help, low=0, below=2**31, choices=()):
    """A field with a help text and limits: low <= number < below, or one of the choices."""
    limits = {"help": help, "low": low, "below": below, "choices": choices}
    return field(default=default, metadata=limits)


def check_options(config):
    """Raises ValueError for an option of another type than its default, or beyond its limits."""
    for f in fields(config):
        value = getattr(config, f.name)
        if type(f.default) is float and type(value) is int:
            value = float(value)
            object.__setattr__(config, f.name, value)  # the way to change a frozen dataclass
        check_type(f.name, value, type(f.default))
        check_limits(f.name, value, f.metadata)


def check_type(name, value, kind):
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r}: must be of type {kind.__name__}")
    if kind is tuple:
        for item in value:
            if type(item) is not int:
                raise ValueError(f"{name}={value!r}: must hold whole numbers")


def check_limits(name, value, limits):
    low = limits["low"]
    below = limits["below"]
    choices = limits["choices"]
    if type(value) in (int, float) and not low <= value < below:
        raise ValueError(f"{name}={value}: must be at least {low}, below {below}")
    if choices and value not in choices:
        raise ValueError(f"{name}={value}: must be one of {', '.join(choices)}")
