"""Fictional biographies: facts that can be counted, and asked for.

After bioS (Allen-Zhu & Li, arXiv:2309.14316, 2404.05405). Every person has a unique name and six attributes,
drawn from pools of fixed size. Each attribute can be stated in five sentences; for each person and attribute
one of the five, chosen at random, is held out of training. recall.jsonl asks with the held-out sentence, so
that recall measures the fact and not the sentence; val.bin states the facts in the held-out sentences.

    python data/facts/prepare.py                                        the default; train.py runs this itself
    python data/facts/prepare.py --people=100000 --out data/facts100k   more facts, for larger models
    python data/facts/prepare.py --new=100      people that those are not, to teach later: data/facts-new
    python data/facts/prepare.py --moved=100    new employers and cities of people who are: data/facts-moved
"""

import argparse
import itertools
import math
import random
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import claim, describe_vocabulary, make_encoding, write_dataset
from data.files import one_line, steady_streams, to_folder

# Made-up words for names of people, places and firms: 16 * 6 * 18 = 1,728, in a fixed shuffled order.
ONSETS = "B D F G K L M N P R S T V Z Br Tr".split()
MIDDLES = "a e i o u ai".split()
CODAS = "bor dan fel gar kin lam mor nar pel ras sen tov vin wick zan dell rik lund".split()
WORDS = ["".join(parts) for parts in itertools.product(ONSETS, MIDDLES, CODAS)]
random.Random(0).shuffle(WORDS)
FIRST, MIDDLE, LAST, CITIES = WORDS[:200], WORDS[200:400], WORDS[400:800], WORDS[800:1000]
MONTHS = (
    "January February March April May June July August September October November December".split()
)
FIELDS = (
    "Biology Chemistry Economics Geology History Law Linguistics Mathematics Music Physics".split()
)
BRANCHES = (
    "Ancient Applied Comparative Computational Experimental General Industrial Marine Modern Theoretical"
).split()
SCHOOLS = "University College Institute Academy School".split()
DAYS, YEARS = range(1, 29), range(1800, 2000)
FIRMS = "Foods Motors Press Systems".split()

# A fact is a sentence of name, phrase and value, in this order: without its value it is a prompt.
POOLS = {  # of values
    "birth date": [f"{month} {day}, {year}" for month in MONTHS for day in DAYS for year in YEARS],
    "birth city": CITIES,
    "university": [f"{word} {kind}" for word in WORDS[1000:1060] for kind in SCHOOLS],
    "major": [f"{branch} {subject}" for branch in BRANCHES for subject in FIELDS],
    "employer": [f"{word} {kind}" for word in WORDS[1060:1126] for kind in FIRMS][:263],
    "work city": CITIES,
}
PHRASES = {  # of three words each, so that a name always stands at the same distance before a value
    "birth date": "was born on, entered life on, started life on, first breathed on, has birthdays on",
    "birth city": "was born in, grew up in, comes originally from, spent childhood in, learned walking in",
    "university": "studied hard at, was enrolled at, earned degrees from, got diplomas from, "
    "attended lectures at",
    "major": "took courses in, holds degrees in, wrote theses on, passed exams in, did research in",
    "employer": "draws wages from, earns money at, got hired by, is employed by, has contracts with",
    "work city": "has offices in, does business in, commutes daily to, works weekdays in, rents desks in",
}
ATTRIBUTES = {name: (pool, PHRASES[name].split(", ")) for name, pool in POOLS.items()}
MOVES = "employer", "work city"  # what changes when somebody moves
BITS = sum(math.log2(len(pool)) for pool, _ in ATTRIBUTES.values())  # of facts per person

# A token is a word with the space before it, the end of a sentence, or a byte: any text can be encoded.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+|\.\n|[^A-Za-z0-9]"
SEPARATOR = "<|endoftext|>"


def build_vocabulary():
    """The list of tokens, as bytes: every word that a biography can have, whatever people and seed are."""
    texts = [
        *PHRASES.values(),
        *(value for pool in POOLS.values() for value in pool),
        *MIDDLE,
        *LAST,
    ]
    words = sorted({" " + word for word in " ".join(texts).replace(",", "").split()})
    return [bytes([i]) for i in range(256)] + [word.encode() for word in [*FIRST, *words, ".\n"]]


def make_people(count, generator, known=()):
    """list of (name, {attribute: value}, {attribute: held-out phrase}); all names differ, also from known."""
    size, taken = len(FIRST) * len(MIDDLE) * len(LAST), {name for name, _, _ in known}
    people = []
    for number in generator.choice(size, count + len(taken), replace=False):
        rest, last = divmod(int(number), len(LAST))
        name = f"{FIRST[rest // len(MIDDLE)]} {MIDDLE[rest % len(MIDDLE)]} {LAST[last]}"
        if name in taken:
            continue
        values = {a: pool[generator.integers(len(pool))] for a, (pool, _) in ATTRIBUTES.items()}
        held_out = {
            a: phrases[generator.integers(len(phrases))] for a, (_, phrases) in ATTRIBUTES.items()
        }
        people.append((name, values, held_out))
    return people[:count]


def move(person, generator):
    """The same person with what has changed, and nothing else: another employer, another city of work."""
    name, values, held_out = person
    others = {a: [value for value in POOLS[a] if value != values[a]] for a in MOVES}
    return name, {a: pool[generator.integers(len(pool))] for a, pool in others.items()}, held_out


def biography(person, generator, held_out=False):
    """A sentence for each fact, in random order, with one of four training phrases, or the held-out one."""
    name, values, held = person
    lines = []
    for attribute in generator.permutation(list(values)):
        phrases = [p for p in ATTRIBUTES[attribute][1] if (p == held[attribute]) == held_out]
        lines.append(f"{name} {phrases[generator.integers(len(phrases))]} {values[attribute]}.\n")
    return "".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--people", type=int, default=2000, help="how many (default: %(default)s)")
    add("--new", type=int, default=0, help="facts of so many other people, and not of those")
    add(
        "--moved",
        type=int,
        default=0,
        help="new employers and cities of so many of those, and nothing else",
    )
    add(
        "--biographies",
        type=int,
        default=20,
        help="of each person in train.bin (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="for people and texts (default: %(default)s)")
    add(
        "--out",
        type=to_folder,
        help="folder to write to (default: this one; or facts-new, facts-moved)",
    )
    add("--overwrite", action="store_true", help="replace the dataset in that folder")
    args = parser.parse_args()
    most = len(FIRST) * len(MIDDLE) * len(LAST)
    if not 1 <= args.people <= most - max(0, args.new):
        parser.error(
            f"--people={args.people}: must be 1 to {most:,}, the number of names, less --new"
        )
    if args.new < 0 or not 0 <= args.moved <= args.people:
        parser.error(
            f"--new={args.new}, --moved={args.moved}: not negative, no more moved than --people"
        )
    kind = "-new" * bool(args.new) + "-moved" * bool(args.moved)
    args.out = args.out or Path(__file__).parents[1] / f"facts{kind}"
    if args.biographies < 1:
        parser.error(f"--biographies={args.biographies}: must be at least 1")
    if args.seed < 0:
        parser.error(f"--seed={args.seed}: must not be negative")
    if args.out.is_dir():
        claim(args.out, args.overwrite)

    generator = np.random.default_rng(args.seed)
    tokens = build_vocabulary()
    separator = len(tokens)
    vocabulary = describe_vocabulary("facts", PATTERN, tokens, {SEPARATOR: separator})
    encoding = make_encoding(vocabulary)
    people = make_people(args.people, generator)
    if kind:
        moved = [people[i] for i in generator.choice(len(people), args.moved, replace=False)]
        people = make_people(args.new, generator, people) + [
            move(person, generator) for person in moved
        ]
    val_rounds = 5 if kind else 1  # val.bin of one person, too, is long enough for a window
    rounds = [("train", False)] * args.biographies + [("val", True)] * val_rounds
    ids = {"train": [], "val": []}
    for split, held_out in tqdm(
        rounds, desc=f"biographies of {len(people):,} people", unit="round"
    ):
        for i in generator.permutation(len(people)):
            text = biography(people[i], generator, held_out)
            ids[split].append(
                np.array([separator, *encoding.encode_ordinary(text)], dtype=np.uint32)
            )
    recall = [
        {"prompt": f"{name} {held_out[a]}", "answer": values[a], "attribute": a}
        for name, values, held_out in people
        for a in values
    ]
    train, val = np.concatenate(ids["train"]), np.concatenate(ids["val"])
    bits = sum(math.log2(len(POOLS[question["attribute"]])) for question in recall)
    counts = {"people": len(people), "facts": len(recall), "bits": round(bits)}
    facts = counts | {"seed": args.seed}
    write_dataset(args.out, train, val, vocabulary, separator, recall, args.overwrite, **facts)
    each = bits / len(people)
    print(
        f"{args.out}: {len(people):,} people, {len(recall):,} facts ({each:.1f} bits per person), "
        f"{len(train):,} training tokens ({args.biographies} biographies per person, with each fact once), "
        f"{len(val):,} validation tokens, vocabulary of {len(tokens) + 1:,}"
    )


if __name__ == "__main__":
    steady_streams()
    with one_line("prepare.py"):
        main()
