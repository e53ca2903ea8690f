"""Progress bars, on a terminal and in a file."""

import sys

from tqdm import tqdm


class Bar(tqdm):
    """A tqdm bar on standard error. If that is no terminal, it writes a line every ten seconds:
    a file keeps every state of a bar."""

    # of a bar that Ctrl-C has kept from starting: there is nothing to close
    in_file = False
    disable = True

    def __init__(self, *args, **settings):
        self.in_file = not sys.stderr.isatty()
        if self.in_file:
            settings["mininterval"] = 10.0
            settings["file"] = Lines()
        super().__init__(*args, dynamic_ncols=True, **settings)

    def set_postfix_str(self, text="", refresh=True):
        super().set_postfix_str(text, refresh and not self.in_file)

    def set_postfix(self, numbers=None, refresh=True, **more):
        super().set_postfix(numbers, refresh and not self.in_file, **more)

    def __del__(self):
        if self.in_file:  # an error has left it: the error's message stays the last line
            self.disable = True
        super().__del__()


class Lines:
    """A stream for tqdm. Standard error gets each state of the bar as a line."""

    def write(self, text):
        text = text.strip("\r\n").rstrip()
        if text:
            print(text, file=sys.stderr)

    def flush(self):
        sys.stderr.flush()
