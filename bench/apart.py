"""Make the facts anew, with two commas between the words of a name: "Zailam,, Zimor,, Rinar was
born in". Then no trigram holds two words of a name, so none is a name.

    python bench/apart.py               data/facts to out/facts-apart
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset import Dataset, check_free, find_folder, make_encoding, write_dataset
from runtime.arguments import Parser, folder_argument
from runtime.files import fail


def put_apart(ids, separator, sentence_end, comma):
    """Token ids -> the same with two commas after the first and the second word of a sentence."""
    starts = np.flatnonzero((ids[:-1] == separator) | (ids[:-1] == sentence_end)) + 1
    starts = starts[ids[starts] != separator]  # which is no sentence
    places = np.concatenate([starts + 1, starts + 2]).repeat(2)  # two commas at each
    return np.insert(ids, places, comma)


def prepare(folder, overwrite):
    check_free(folder, overwrite)
    facts = Dataset(find_folder("facts"))
    vocabulary = facts.vocabulary()
    encoding = make_encoding(vocabulary)
    tokens = [facts.separator, *encoding.encode(".\n"), *encoding.encode(",")]
    splits = [put_apart(facts.tokens(name), *tokens) for name in ("train", "val")]
    questions = []
    for question in facts.questions():
        prompt = question["prompt"].replace(" ", ",, ", 2)
        kept = {name: question[name] for name in ("answer", "attribute")}
        questions.append({"prompt": prompt, **kept})
    write_dataset(folder, *splits, vocabulary, facts.separator, questions, overwrite)
    print(f"{folder}: {len(splits[0]):,} training tokens, {len(splits[1]):,} validation tokens")


def main(argv):
    parser = Parser(__doc__)
    out = "folder to write to (default: %(default)s)"
    default = Path("out/facts-apart")
    parser.add_argument("--out", type=folder_argument, default=default, help=out)
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset there")
    args = parser.parse_args(argv)
    try:
        prepare(args.out, args.overwrite)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    main(sys.argv[1:])
