"""The progress bar of a run, and the clock of its training time."""

import time

from tqdm import tqdm

SHOWN = {  # of a line of the log
    "loss": "{:.3f}",
    "tokens_per_s": "{:,.0f}",
    "gpu_gib": "{:.1f}",
    "val_loss": "{:.3f}",
    "recall": "{:.1%}",
    "old_recall": "{:.1%}",
}


class Progress:
    """A bar of the steps, with the latest of the numbers in SHOWN."""

    def __init__(self, name, step, steps, hidden=False):
        self.numbers = {}
        self.bar = tqdm(
            desc=name,
            initial=step,
            total=steps,
            unit="step",
            dynamic_ncols=True,
            disable=hidden,
        )

    def update(self):
        """After a step."""
        self.bar.update()

    def show(self, line):
        """line: of the log"""
        for name, form in SHOWN.items():
            if name in line:
                self.numbers[name] = form.format(line[name])
        self.bar.set_postfix(self.numbers)

    def close(self):
        self.bar.close()


class Clock:
    """Seconds of training, without evaluations and checkpoints: it runs from start() to stop()."""

    def __init__(self, step):
        self.start(step)

    def start(self, step):
        self.began = time.perf_counter()
        self.step = step

    def stop(self, step):
        """Steps and seconds since the start."""
        return step - self.step, time.perf_counter() - self.began
