"""The progress bar of a run, the clock of its training time, and its summary."""

import shlex
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
        self.estimates = 0
        self.bar = tqdm(
            desc=Path(run.config.out_dir).name,
            initial=run.step,
            total=run.config.max_iters,
            unit="step",
            dynamic_ncols=True,
            disable=hidden,
        )

    def update(self):
        """Count one step."""
        self.bar.update()

    def estimate(self, steps_per_second):
        """At the second call, print how long the rest takes. The first steps are slower."""
        self.estimates += 1
        seconds = (self.bar.total - self.bar.n) / steps_per_second
        if self.estimates == 2 and seconds > 90 and not self.bar.disable:
            self.bar.write(f"Training should take {about(seconds)}. Evaluations come on top")

    def note(self, text):
        """Show what takes long now."""
        self.bar.set_postfix_str(text)

    def show(self, line):
        """line: of the log"""
        for name, form in SHOWN.items():
            if name in line:
                self.numbers[name] = form.format(line[name])
        self.bar.set_postfix(self.numbers)

    def close(self):
        self.bar.close()


def about(seconds):
    """6000 -> "about 1.7 hours" """
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {seconds / 3600:.1f} hours"


class Clock:
    """Counts the training time of a run in run.seconds, without evaluations and checkpoints."""

    def __init__(self, run):
        self.run = run
        self.start()

    def start(self):
        self.began = time.perf_counter()
        self.first_step = self.run.step

    def stop(self):
        """Return the steps per second since the start."""
        seconds = time.perf_counter() - self.began
        self.run.seconds += seconds
        return (self.run.step - self.first_step) / seconds


def summarize(run, tokens, result):
    """Print the summary at the end of a run. tokens: the number read; result: the last line of
    the log"""
    print(f"\n{run.step:,} steps, {tokens:,} tokens in {run.seconds:.0f} s of training")
    losses = "{train_loss:.3f} train, {val_loss:.3f} validation (nats a token)"
    print(f"  loss         {losses.format(**result)}")
    print_recall(run.data["questions"], "recall", result, run.before)
    if "old" in run.data:
        print_recall(run.data["old"]["questions"], "old_recall", result, run.before)
    if run.model.pool is not None:
        usage = "{mem_used:.1%} of slots read; the busiest 1% get {mem_top1:.1%} of reads"
        print(f"  memory       {usage.format(**result)}")
    print(f"  written to   {run.config.out_dir}/ckpt.pt, log.jsonl")
    command = ["sample.py", f"--out_dir={run.config.out_dir}"]
    if "recall" in result:
        command.append("--recall")
    print(f"\nNext: python {shlex.join(command)}")


def print_recall(questions, name, result, before):
    if name not in result:
        return
    text = f"{result[name]:.1%} of {len(questions):,} closed-book questions"
    if name in before:
        text += f" ({before[name]:.1%} before)"
    print(f"  {name.replace('_', ' '):10}   {text}")
