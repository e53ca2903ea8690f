"""Command lines: the parser that all programs share, and types of arguments."""

import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from difflib import get_close_matches
from pathlib import Path


class Parser(ArgumentParser):
    """An ArgumentParser that keeps the lines of the description, takes no abbreviated options, and
    gives a hint for an unknown option."""

    def __init__(self, description, **settings):
        self.names = []
        super().__init__(
            description=description,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def add_argument(self, *names, **settings):
        action = super().add_argument(*names, **settings)
        self.names += action.option_strings
        return action

    def parse_known_args(self, argv=None, namespace=None):
        if argv is None:
            argv = sys.argv[1:]
        for word in argv:
            if word.startswith("--") and word.partition("=")[2] == "--":
                self.error(f"{word}: -- cannot be a value")  # argparse would make it []
        return super().parse_known_args(argv, namespace)

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.refuse(unknown[0])
        return args

    def refuse_given(self, args, names, why):
        """Exit with 2 if an option was given that would have no effect."""
        for name in names:
            value = getattr(args, name)
            if value != self.get_default(name):
                self.error(f"--{name}={value}: {why}")

    def refuse(self, word):
        """Exit with 2 on an unknown option, and name a similar one."""
        hint = "--help lists all"
        name = word.partition("=")[0]
        similar = [known for known in self.names if known.startswith(name) and len(name) > 2]
        similar += get_close_matches(name, self.names, n=1)
        if similar:
            hint = f"did you mean {similar[0]}?"
        self.error(f"there is no option {word}; {hint}")


# --- types of arguments ---------------------------------------------------------------


def path_argument(text):
    """A path. The shell does not expand the ~ of --out=~/x, so this does. Refuses an empty name,
    perhaps from an unset variable."""
    if not text.strip():
        raise ArgumentTypeError("must name a folder or a file")
    return Path(os.path.expanduser(text))


def dataset_argument(text):
    """The name of a folder in data/, or a path."""
    if not text.strip():
        raise ArgumentTypeError("must name a folder")
    return os.path.expanduser(text)


def folder_argument(text):
    """A folder to write to."""
    path = path_argument(text)
    if path.is_file():
        raise ArgumentTypeError(f"{path} is a file, but must be a folder")
    return path
