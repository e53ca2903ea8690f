"""Show what a model reads in its memory. For each new token, print the slots with the largest
weights and the passages of the training data that read these slots most. For an n-gram memory,
print its gate (of bigrams, their strength), and which n-grams read the same row of its first head.

    python edit/inspect_slots.py --start="Zailam Zimor Rinar was born in"
    python edit/inspect_slots.py --start="Zailam Zimor Rinar was born in" --json | head -1
    python edit/inspect_slots.py --recall      which other facts share the slots of each question

The first call reads the training data once, and saves the readers of slots in readers.pt beside
the checkpoint.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from edit.ngrams import NgramInspector
from edit.readers import Reads, open_readers, passage
from runtime.arguments import Parser, dataset_argument
from runtime.files import fail, ignore_stream_errors, print_strictly
from sample import Sampler, add_model_options, check_limits

SHOWN_SLOTS = 3  # of a token and layer
SHOWN_PASSAGES = 4  # of a slot


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--max_new_tokens", type=int, default=8, help="tokens to generate (default: %(default)s)")
    passages = "dataset of the passages (default: the one the run was trained on)"
    add("--dataset", type=dataset_argument, help=passages)
    add("--json", action="store_true", help="print all reads as JSON")
    add("--recall", action="store_true", help="inspect the closed-book questions, not a text")
    add("--rows", type=int, default=0, help="number of questions; 0: all (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.recall:
        names = ("start", "max_new_tokens")
        parser.refuse_given(args, names, "--recall inspects a dataset's questions: leave this out")
    else:
        parser.refuse_given(args, ("rows",), "needs --recall")
    check_limits(parser, args, ("max_new_tokens",), low=1)
    check_limits(parser, args, ("rows",), low=0)
    return args


# --- a text ---------------------------------------------------------------------------


def open_inspectors(sampler, dataset):
    """An inspector of each memory that the model has. They record what the model reads."""
    inspectors = []
    if sampler.model.pool is not None:
        inspectors.append(SlotInspector(sampler, dataset))
    if sampler.model.ngram_pool is not None:
        inspectors.append(NgramInspector(sampler, dataset))
    return inspectors


def inspect_text(sampler, inspectors, ids, args):
    """Continue ids greedily, and print what each new token read."""
    if not args.json:
        print(sampler.encoding.decode(ids[1:]), end="")
    for token, text in sampler.stream(ids, max_new_tokens=args.max_new_tokens, temperature=0):
        if token is None:  # half a character at the end
            break
        line = {"token": text}
        if not args.json:
            print(f"\n\n{text!r}", end="")
        for inspector in inspectors:
            found = inspector.reads_of_last_token(ids)
            line[inspector.name] = found
            if not args.json:
                inspector.print(found)
        if args.json:
            print(json.dumps(line))
        ids = [*ids, token]
    if not args.json:
        print()


class SlotInspector:
    """Shows the slots that memory layers read, and which passages of the training data read them
    most."""

    name = "reads"

    def __init__(self, sampler, dataset):
        self.encoding = sampler.encoding
        self.blocks = sampler.model.config.mem_layers
        files = (sampler.path, sampler.model, dataset, sampler.context)
        self.readers, self.train_ids = open_readers(*files)
        self.reads = Reads(sampler.model.config)
        sampler.model.pool.usage = self.reads

    def reads_of_last_token(self, ids):
        found = []
        for block, layer in zip(self.blocks, self.reads.last_token(), strict=True):
            for slot, share in zip(*layer, strict=True):
                passages = []
                for position in self.readers.positions[slot].tolist():
                    if position >= 0:
                        passages.append(passage(self.train_ids, position, self.encoding))
                found.append({"block": block, "slot": slot, "share": share, "readers": passages})
        return found

    def print(self, found):
        shown = defaultdict(int)  # slots of each block
        for read in found:
            shown[read["block"]] += 1
            if shown[read["block"]] > SHOWN_SLOTS:
                continue
            place = f"block {read['block']}, slot {read['slot']:,}"
            print(f"\n  {place}, {read['share']:.1%} of weights, read by", end="")
            lines = [f"{before} →{after}".strip("\n") for before, after in read["readers"]]
            if not lines:
                print(" nobody", end="")
            for line in list(dict.fromkeys(lines))[:SHOWN_PASSAGES]:
                print(f"\n      {line}", end="")


# --- all questions --------------------------------------------------------------------


def inspect_questions(sampler, questions, as_json):
    """Print which facts share the slot that a question reads most: facts of the same person, of
    the same attribute, or neither. With as_json, print what each question reads instead."""
    facts = []  # (person, attribute)
    for question in questions:
        person = question["prompt"].rsplit(" ", 3)[0]  # before a phrase of three words
        facts.append((person, question["attribute"]))
    layers = zip(*reads_of_questions(sampler, questions), strict=True)
    for block, layer in zip(sampler.model.config.mem_layers, layers, strict=True):
        reads = [dict(zip(slots, shares, strict=True)) for slots, shares in layer]
        if as_json:
            print_json(sampler.model.config.mem_keys, block, facts, reads)
        else:
            print_sharing(block, facts, reads)


def print_json(keys, block, facts, reads):
    """Print one line: the slots of each fact and their shares, in a memory of keys * keys slots."""
    rows = []
    for (person, attribute), shares in zip(facts, reads, strict=True):
        pairs = [[slot, round(share, 4)] for slot, share in shares.items()]
        rows.append([person, attribute, pairs])
    print(json.dumps({"keys": keys, "block": block, "reads": rows}))


@torch.no_grad()
def reads_of_questions(sampler, questions):
    """Return what each question's last token reads, for each layer: lists of (slots, shares)."""
    model = sampler.model
    reads = Reads(model.config)
    model.pool.usage = reads
    result = []
    for question in questions:
        ids = [sampler.separator, *question["prompt_ids"]]
        model.hidden(torch.tensor([ids], device=sampler.device))
        result.append(reads.last_token())
    model.pool.usage = None
    return result


def print_sharing(block, facts, reads):
    first, mass = shared(facts, reads)
    slots = {slot for shares in reads for slot in shares}
    top = sum(max(shares.values()) for shares in reads) / len(reads)
    print(f"block {block}, {len(facts):,} questions: they read {len(slots):,} slots. The slot that")
    print(f"each reads most has {top:.1%} of its weights. Of the other facts that read this slot")
    for kind in ("person", "attribute", "neither", "nobody"):
        share = first.get(kind, 0) / len(facts)
        weight = mass.get(kind, 0) / len(facts)
        print(
            f"  {kind:10} the one with the largest weight {share:6.1%}, all weights {weight:6.1%}"
        )


def shared(facts, reads):
    """facts [(person, attribute)], reads [{slot: share}] -> two dicts over all facts, for the slot
    that each fact reads most. {kind: count} counts the other fact with the largest share. {kind:
    sum} adds each kind's part of all others' shares."""
    readers = defaultdict(list)
    for fact, shares in zip(facts, reads, strict=True):
        for slot, share in shares.items():
            readers[slot].append((share, fact))
    first = defaultdict(int)
    mass = defaultdict(float)
    for fact, shares in zip(facts, reads, strict=True):
        slot = max(shares, key=shares.get)
        kinds = []
        for share, other in readers[slot]:
            if other != fact:
                kinds.append((share, kind_of(fact, other)))
        if not kinds:
            first["nobody"] += 1
            continue
        first[max(kinds)[1]] += 1
        total = sum(share for share, _ in kinds)
        for share, kind in kinds:
            mass[kind] += share / total
    return dict(first), dict(mass)


def kind_of(fact, other):
    if fact[0] == other[0]:
        return "person"
    if fact[1] == other[1]:
        return "attribute"
    return "neither"


def main(argv):
    args = parse(argv)
    try:
        sampler = Sampler(args)
        if not sampler.model.pools():
            raise ValueError(f"the model in {sampler.path} has no memory")
        dataset = sampler.open_dataset(args.dataset)
        if args.recall:
            if sampler.model.pool is None:
                raise ValueError(f"--recall: the model in {sampler.path} has no memory layers")
            sampler.apply(args.delta)
            questions = dataset.questions()
            if not questions:
                raise ValueError(f"--recall: {dataset.folder} has no recall.jsonl")
            if args.rows > 0:
                questions = questions[: args.rows]
            with sampler.generating():
                inspect_questions(sampler, questions, args.json)
            return
        ids = sampler.encode(args.start)
        # before the delta: an update changes what slots hold, not who reads them
        inspectors = open_inspectors(sampler, dataset)
        sampler.apply(args.delta)
        with sampler.generating():
            inspect_text(sampler, inspectors, ids, args)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    ignore_stream_errors()
    print_strictly()
    main(sys.argv[1:])
