"""Whose slots are they? For each closed-book question of a run the slot that its last token reads most, and
who else reads that: other facts of the same person, facts of the same attribute, or neither.

    python bench/slots.py                       the default run, out/facts-memory
    python bench/slots.py --draw                and the reads of some facts to assets/slots.json, for draw.py
"""

import json
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import Dataset, find_folder
from data.files import one_line, write_file
from data.readers import Reads
from train import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@torch.no_grad()
def reads_of(model, questions, separator):
    """What the last token of each question reads, per layer: lists of (slots, shares)."""
    result, model.pool.usage = [], Reads(model.config)
    for question in questions:
        model.hidden(torch.tensor([[separator, *question["prompt_ids"]]]))
        result.append(model.pool.usage.last())
    model.pool.usage = None
    return result


def shared(facts, reads):
    """facts [(person, attribute)], reads [{slot: share}]. Of the slot that a fact reads most, over all facts:
    {kind: count} of the other fact with the largest share, {kind: sum} of the division of all others'."""
    readers, first, mass = defaultdict(list), defaultdict(int), defaultdict(float)
    for fact, shares in zip(facts, reads, strict=True):
        for slot, share in shares.items():
            readers[slot].append((share, fact))
    for fact, shares in zip(facts, reads, strict=True):
        others = [
            (share, other) for share, other in readers[max(shares, key=shares.get)] if other != fact
        ]
        kinds = [(share, kind_of(fact, other)) for share, other in others]
        first[max(kinds)[1] if kinds else "nobody"] += 1
        for share, kind in kinds:
            mass[kind] += share / sum(share for share, _ in kinds)
    return dict(first), dict(mass)


def kind_of(fact, other):
    return "person" if fact[0] == other[0] else "attribute" if fact[1] == other[1] else "neither"


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out_dir", default="out/facts-memory", help="of the run (default: %(default)s)"
    )
    parser.add_argument("--draw", action="store_true", help="write assets/slots.json")
    args = parser.parse_args()
    checkpoint = load_checkpoint(Path(args.out_dir, "ckpt.pt"))
    model, N = checkpoint["model"], checkpoint["model"].config.mem_keys
    questions = Dataset(find_folder(checkpoint["train_config"]["dataset"])).questions()
    if model.pool is None or not questions:
        raise ValueError(
            f"{args.out_dir}: needs a model with a memory, and a dataset that asks questions"
        )
    facts = [(q["prompt"].rsplit(" ", 3)[0], q["attribute"]) for q in questions]
    layers = zip(*reads_of(model, questions, checkpoint["separator"]), strict=True)
    for block, layer in zip(model.config.mem_layers, layers, strict=True):
        reads = [dict(zip(*read, strict=True)) for read in layer]
        first, mass = shared(facts, reads)
        top = sum(max(shares.values()) for shares in reads) / len(reads)
        slots = len({slot for shares in reads for slot in shares})
        print(
            f"block {block}, {len(facts):,} questions, which read {slots:,} slots. The slot that one reads"
        )
        print(f"most has {top:.1%} of its weights. Of the others who read that")
        for kind in ("person", "attribute", "neither", "nobody"):
            share, weight = first.get(kind, 0) / len(facts), mass.get(kind, 0) / len(facts)
            print(
                f"  {kind:10} the one with the largest weight {share:6.1%}, of all weights {weight:6.1%}"
            )
    if args.draw:
        people = [*dict.fromkeys(person for person, _ in facts)][:6]
        shown = [[*fact, [[slot, round(share, 4)] for slot, share in shares.items()]]
                 for fact, shares in zip(facts, reads, strict=True) if fact[0] in people]  # fmt: skip
        write_file(ROOT / "assets" / "slots.json", json.dumps({"keys": N, "reads": shown}) + "\n")


if __name__ == "__main__":
    with one_line("slots.py", (OSError, ValueError)):
        main()
