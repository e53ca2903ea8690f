"""The progress bar of a run, and the clock of its training time."""

import time
from pathlib import Path

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
    """A bar of the steps, with the latest of the numbers in SHOWN. run: its step, config.out_dir,
    config.max_iters"""

    def __init__(self, run, hidden=False):
        self.numbers = {}
        self.bar = tqdm(
            desc=Path(run.config.out_dir).name,
            initial=run.step,
            total=run.config.max_iters,
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
    """Counts the training time of a run, run.seconds, without evaluations and checkpoints."""

    def __init__(self, run):
        self.run = run
        self.start()

    def start(self):
        self.began = time.perf_counter()
        self.first_step = self.run.step

    def stop(self):
        """Steps a second since the start."""
        seconds = time.perf_counter() - self.began
        self.run.seconds += seconds
        return (self.run.step - self.first_step) / seconds
