"""Fictional biographies: facts that can be counted and asked for.

After bioS (Allen-Zhu & Li, arXiv:2309.14316, 2404.05405). Every person has a unique name and six
attributes, drawn from pools of fixed size. Five sentences can state each attribute. For each person
and attribute, one of the five is chosen at random and held out of training. recall.jsonl asks with
the held-out sentence, so recall measures the fact and not the sentence. val.bin states the facts in
the held-out sentences.

    python data/facts/prepare.py                 the default; train.py runs this itself
    python data/facts/prepare.py --people=100000 --out data/facts100k          more facts
    python data/facts/prepare.py --new=100       other people, to teach later: data/facts-new
    python data/facts/prepare.py --moved=100     new employers and cities of some: data/facts-moved
"""

import itertools
import math
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.dataset import (
    DTYPES,
    check_free,
    describe_vocabulary,
    dtype_name,
    make_encoding,
    write_dataset,
)
from runtime.arguments import Parser, folder_argument
from runtime.bars import Bar
from runtime.files import fail, ignore_stream_errors, lock_folder

# Made-up words for names of people, places and firms: 16 * 6 * 18 = 1,728, in a fixed order.
ONSETS = "B D F G K L M N P R S T V Z Br Tr".split()
MIDDLES = "a e i o u ai".split()
CODAS = "bor dan fel gar kin lam mor nar pel ras sen tov vin wick zan dell rik lund".split()
WORDS = ["".join(parts) for parts in itertools.product(ONSETS, MIDDLES, CODAS)]
random.Random(0).shuffle(WORDS)
FIRST = WORDS[:200]
MIDDLE = WORDS[200:400]
LAST = WORDS[400:800]
CITIES = WORDS[800:1000]
NAMES = len(FIRST) * len(MIDDLE) * len(LAST)
MONTHS = (
    "January February March April May June July August September October November December".split()
)
FIELDS = (
    "Biology Chemistry Economics Geology History Law Linguistics Mathematics Music Physics".split()
)
BRANCHES = (
    "Ancient Applied Comparative Computational Experimental "
    "General Industrial Marine Modern Theoretical"
).split()
SCHOOLS = "University College Institute Academy School".split()
DAYS = range(1, 29)
YEARS = range(1800, 2000)
FIRMS = "Foods Motors Press Systems".split()

# A fact is a sentence: a name, a phrase, a value, in this order. Without its value it is a prompt.
POOLS = {  # of values
    "birth date": [f"{month} {day}, {year}" for month in MONTHS for day in DAYS for year in YEARS],
    "birth city": CITIES,
    "university": [f"{word} {kind}" for word in WORDS[1000:1060] for kind in SCHOOLS],
    "major": [f"{branch} {subject}" for branch in BRANCHES for subject in FIELDS],
    "employer": [f"{word} {kind}" for word in WORDS[1060:1126] for kind in FIRMS][:263],
    "work city": CITIES,
}
PHRASES = {  # three words each, so the distance from a name to its value is always the same
    "birth date": "was born on, entered life on, started life on, first breathed on, "
    "has birthdays on",
    "birth city": "was born in, grew up in, comes originally from, spent childhood in, "
    "learned walking in",
    "university": "studied hard at, was enrolled at, earned degrees from, got diplomas from, "
    "attended lectures at",
    "major": "took courses in, holds degrees in, wrote theses on, passed exams in, did research in",
    "employer": "draws wages from, earns money at, got hired by, is employed by, "
    "has contracts with",
    "work city": "has offices in, does business in, commutes daily to, works weekdays in, "
    "rents desks in",
}
PHRASES = {attribute: text.split(", ") for attribute, text in PHRASES.items()}
MOVES = ("employer", "work city")  # what changes when somebody moves
BITS = sum(math.log2(len(pool)) for pool in POOLS.values())  # of facts per person

# A token is a word with the space before it, the end of a sentence, or a byte. Bytes can encode any
# text.
PATTERN = r" ?[A-Za-z]+| ?[0-9]+|\.\n|[^A-Za-z0-9]"
SEPARATOR = "<|endoftext|>"
SENTENCE = 8  # tokens of the shortest one: name 3, phrase 3, value 1, end 1
TOKENS = 20 * 64  # of a file, at least: 20 windows of the facts presets


def build_vocabulary():
    """Return the list of tokens, as bytes: every word of every possible biography, for any people
    and seed."""
    texts = []
    for phrases in PHRASES.values():
        texts += phrases
    for pool in POOLS.values():
        texts += pool
    texts += MIDDLE + LAST
    words = sorted({" " + word for word in " ".join(texts).replace(",", "").split()})
    single_bytes = [bytes([i]) for i in range(256)]
    return single_bytes + [word.encode() for word in [*FIRST, *words, ".\n"]]


def make_people(count, generator, known=()):
    """list of (name, {attribute: value}, {attribute: held-out phrase}). Names differ from each
    other and from those in known."""
    taken = {name for name, _, _ in known}
    people = []
    for number in generator.choice(NAMES, count + len(taken), replace=False):
        rest, last = divmod(int(number), len(LAST))
        first, middle = divmod(rest, len(MIDDLE))
        name = f"{FIRST[first]} {MIDDLE[middle]} {LAST[last]}"
        if name in taken:
            continue
        values = {}
        for attribute, pool in POOLS.items():
            values[attribute] = pool[generator.integers(len(pool))]
        held_out = {}
        for attribute, phrases in PHRASES.items():
            held_out[attribute] = phrases[generator.integers(len(phrases))]
        people.append((name, values, held_out))
    return people[:count]


def move(person, generator):
    """Return the same person with only the facts that have changed: another employer and another
    work city."""
    name, values, held_out = person
    new = {}
    for attribute in MOVES:
        others = [value for value in POOLS[attribute] if value != values[attribute]]
        new[attribute] = others[generator.integers(len(others))]
    return name, new, held_out


def biography(person, generator, held_out=False):
    """Write a sentence for each fact, in random order, with one of the four training phrases or
    with the held-out one."""
    name, values, held = person
    lines = []
    for attribute in generator.permutation(list(values)):
        phrases = [p for p in PHRASES[attribute] if (p == held[attribute]) == held_out]
        lines.append(f"{name} {phrases[generator.integers(len(phrases))]} {values[attribute]}.\n")
    return "".join(lines)


def encode_biographies(people, rounds, generator, encoding, held_out):
    """Write biographies of all people, in random order, `rounds` times -> token ids."""
    separator = encoding.encode_single_token(SEPARATOR)
    dtype = DTYPES[dtype_name(encoding.n_vocab)]
    ids = []
    for _ in Bar(range(rounds), f"biographies of {len(people):,} people", unit="round"):
        texts = []
        for i in generator.permutation(len(people)):
            text = biography(people[i], generator, held_out)
            texts.append(np.array([separator, *encoding.encode_ordinary(text)], dtype))
        ids.append(np.concatenate(texts))
    return np.concatenate(ids)


def make_questions(people):
    """Questions for recall.jsonl."""
    questions = []
    for name, values, held_out in people:
        for a, value in values.items():
            question = {"prompt": f"{name} {held_out[a]}", "answer": value, "attribute": a}
            questions.append(question)
    return questions


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--people", type=int, default=2000, help="number of people (default: %(default)s)")
    add("--new", type=int, default=0, help="instead write the facts of this many other people")
    add("--moved", type=int, default=0, help="instead write new employers and cities of this many")
    rounds = "per person in train.bin (default: 20); of few people, more"
    add("--biographies", type=int, default=20, help=rounds)
    add("--seed", type=int, default=0, help="seed of people and texts (default: %(default)s)")
    places = "default: this one, or facts-new, facts-moved"
    add("--out", type=folder_argument, help=f"folder to write to ({places})")
    add("--overwrite", action="store_true", help="replace the dataset in that folder")
    args = parser.parse_args(argv)
    if not 0 <= args.new < NAMES:
        parser.error(f"--new={args.new}: must be 0 to {NAMES - 1:,}; there are no more names")
    most = NAMES - args.new
    if not 1 <= args.people <= most:
        parser.error(f"--people={args.people}: must be 1 to {most:,}, the names less --new")
    if not 0 <= args.moved <= args.people:
        parser.error(f"--moved={args.moved}: must be 0 to --people={args.people}")
    if args.biographies < 1:
        parser.error(f"--biographies={args.biographies}: must be at least 1")
    if args.seed < 0:
        parser.error(f"--seed={args.seed}: must not be negative")
    if args.out is None:
        name = "facts"
        if args.new > 0:
            name += "-new"
        if args.moved > 0:
            name += "-moved"
        args.out = Path(__file__).parents[1] / name
    return args


def choose_people(args, generator):
    """Choose the people in the dataset."""
    people = make_people(args.people, generator)
    if args.new == 0 and args.moved == 0:
        return people
    numbers = generator.choice(len(people), args.moved, replace=False)
    new = make_people(args.new, generator, people)
    return new + [move(people[i], generator) for i in numbers]


def write(args, people, generator):
    """Write the dataset of some people of choose_people."""
    tokens = build_vocabulary()
    vocabulary = describe_vocabulary("facts", PATTERN, tokens, {SEPARATOR: len(tokens)})
    encoding = make_encoding(vocabulary)
    val_rounds = 1
    about = {}  # for meta.json
    if args.new + args.moved > 0:
        val_rounds = 5
        about["known"] = {"people": args.people, "seed": args.seed}  # see check_people
    sentences = sum(len(values) for _, values, _ in people)
    least = math.ceil(TOKENS / (SENTENCE * sentences))
    train_rounds = max(args.biographies, least)
    val_rounds = max(val_rounds, least)
    train = encode_biographies(people, train_rounds, generator, encoding, held_out=False)
    val = encode_biographies(people, val_rounds, generator, encoding, held_out=True)
    questions = make_questions(people)
    bits = sum(math.log2(len(POOLS[question["attribute"]])) for question in questions)
    write_dataset(
        args.out,
        train,
        val,
        vocabulary,
        separator=len(tokens),
        recall=questions,
        overwrite=args.overwrite,
        people=len(people),
        facts=len(questions),
        bits=round(bits),
        seed=args.seed,
        **about,
    )
    facts = f"{len(questions):,} facts ({bits / len(people):.1f} bits per person)"
    print(f"{args.out}: {len(people):,} people, {facts}, vocabulary of {len(tokens) + 1:,}")
    each = f"{train_rounds} biographies per person, with each fact once"
    print(f"  {len(train):,} training tokens ({each}), {len(val):,} validation tokens")


def main(argv):
    args = parse(argv)
    try:
        if args.out.is_dir():
            lock_folder(args.out, wait=True)
            check_free(args.out, args.overwrite)
        generator = np.random.default_rng(args.seed)
        write(args, choose_people(args, generator), generator)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    ignore_stream_errors()
    main(sys.argv[1:])
