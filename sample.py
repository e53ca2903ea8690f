"""Generate text from a checkpoint, or answer the closed-book questions of its dataset.

    python sample.py                          samples from the default run, out/facts-memory
    python sample.py --start="Once upon a"    continue a text (FILE:path: a file, -: standard input)
    python sample.py --recall                 ask for each fact in wording held out of training
    python sample.py --recall --dataset=facts-new --delta=out/facts-new/delta.pt

edit/update.py makes deltas. edit/inspect_slots.py shows which slots a text reads.
"""

import codecs
import contextlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out

import torch

from data.dataset import Dataset, answer_questions, check_people, find_folder, make_encoding
from edit.delta import apply_deltas
from model import GPT
from runtime.arguments import Parser, dataset_argument, path_argument
from runtime.checkpoint import read_checkpoint
from runtime.device import choose_device, precision
from runtime.files import explain_errors, explain_out_of_memory, explain_output_errors, fail
from runtime.files import ignore_stream_errors, open_text, print_strictly


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_model_options(parser)
    add("--num_samples", type=int, default=3, help="number of texts (default: %(default)s)")
    add("--max_new_tokens", type=int, default=200, help="tokens per text (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: greedy (default: %(default)s)")
    add("--top_k", type=int, help="sample only from the k most likely tokens")
    add("--top_p", type=float, help="sample only from the fewest tokens with total probability p")
    add("--seed", type=int, default=1, help="seed of the sampling (default: %(default)s)")
    add("--recall", action="store_true", help="ask the dataset's closed-book questions instead")
    add("--rows", type=int, default=20, help="questions to show, 0: all (default: %(default)s)")
    questions = "with --recall: dataset of the questions (default: the run's own)"
    add("--dataset", type=dataset_argument, help=questions)
    args = parser.parse_args(argv)
    if args.recall:
        names = ["start", "num_samples", "max_new_tokens", "top_k", "top_p", "seed"]
        if args.temperature != 0:  # answers are greedy
            names.append("temperature")
        parser.refuse_given(args, names, "--recall asks a dataset's questions: leave this out")
    else:
        parser.refuse_given(args, ("rows", "dataset"), "needs --recall")
    check_limits(parser, args, ("num_samples", "max_new_tokens", "top_k"), low=1)
    check_limits(parser, args, ("temperature", "rows"), low=0)
    check_limits(parser, args, ("top_p",), low=0, high=1)
    check_limits(parser, args, ("seed",), low=0, high=2**63 - 1)
    return args


def add_model_options(parser):
    add = parser.add_argument
    run = "folder of the run (default: %(default)s)"
    add("--out_dir", type=path_argument, default="out/facts-memory", help=run)
    add("--start", default="", help="text to continue; FILE:path: a file, -: standard input")
    update = "update to apply: delta.pt of edit/update.py; can be given again"
    add("--delta", type=path_argument, action="append", default=[], metavar="FILE", help=update)
    add("--device", default="auto", help="cpu, cuda, mps (default: the fastest available)")
    dtypes = ["auto", "float32", "bfloat16"]
    add("--dtype", default="auto", choices=dtypes, help="auto: bfloat16 on a GPU")


def check_limits(parser, args, names, low, high=10**9):
    for name in names:
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name}={value}: must be from {low} to {high}")


class Sampler:
    """A run opened to generate text: model, encoding, separator, and the checkpoint without its
    tensors. args: the options of add_model_options"""

    def __init__(self, args):
        self.path = Path(args.out_dir, "ckpt.pt")
        self.device = choose_device(args.device)
        self.context = precision(args.dtype, self.device)
        self.checkpoint = read_checkpoint(self.path)
        self.separator = self.checkpoint["separator"]
        self.model = GPT.from_checkpoint(self.path, self.device)
        with explain_errors(self.path, "give another --out_dir"):
            self.encoding = make_encoding(self.checkpoint["vocabulary"])
            tokens = self.encoding.n_vocab
            rows = self.model.config.vocab_size
            if tokens != rows:
                raise ValueError(f"{tokens} tokens in its vocabulary, {rows} in its model")

    def apply(self, deltas):
        """Apply the files of --delta, one after another."""
        if deltas and self.model.pool is None:
            raise ValueError(f"--delta={deltas[0]}: the model in {self.path} has no memory layers")
        apply_deltas(self.model, self.path, deltas)

    def open_dataset(self, name):
        """Open the dataset called name. None: the run's own, which must not have changed since."""
        with explain_errors(f"{self.path} names no dataset", "give one with --dataset"):
            folder = find_folder(name or self.checkpoint["train_config"]["dataset"])
        dataset = Dataset(folder)
        if not name and dataset.fingerprint() != self.checkpoint["fingerprint"]:
            what = "is not what this checkpoint was trained on"
            raise ValueError(f"{dataset.folder} {what}; name one with --dataset")
        if dataset.vocabulary() != self.checkpoint["vocabulary"]:
            raise ValueError(f"--dataset={name}: its vocabulary differs from {self.path}'s")
        check_people(f"--dataset={name}", dataset.meta, self.checkpoint["meta"])
        return dataset

    def encode(self, start):
        """The text of --start -> token ids. They begin with a separator, as a document does."""
        text = read_text(start)
        with explain_errors("--start", f"the vocabulary in {self.path} cannot take it"):
            ids = self.encoding.encode(text, allowed_special="all")
        if ids[:1] != [self.separator]:
            ids = [self.separator, *ids]
        return ids

    @contextlib.contextmanager
    def generating(self):
        """Generate with the right precision; turn errors into messages."""
        what = f"{self.path} cannot be sampled from"
        with (
            explain_errors(what, "give another --out_dir"),
            explain_out_of_memory("try --device=cpu"),
            explain_output_errors(),
            self.context,
        ):
            yield

    def stream(self, ids, **options):
        """Yield each new token and its text. The last text may have no token, None. options: those
        of GPT.stream"""
        prompt = torch.tensor([ids], device=self.device)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # tokens may split a character
        for token in self.model.stream(prompt, **options):
            text = decoder.decode(self.encoding.decode_single_token_bytes(token.item()))
            yield token.item(), text
        rest = decoder.decode(b"", final=True)
        if rest:
            yield None, rest


def read_text(start):
    file = os.fsencode(start)  # the text itself
    if start == "-":
        file = 0  # standard input
    elif start.startswith("FILE:"):
        file = os.path.expanduser(start.removeprefix("FILE:"))
    with (
        explain_errors(f"--start={start}", "it must be UTF-8 text"),
        open_text(file) as text,
    ):
        return text.read()


def print_samples(sampler, ids, args):
    """Print num_samples continuations of a text, each token as soon as it is drawn."""
    generator = torch.Generator(sampler.device).manual_seed(args.seed)
    began = time.perf_counter()
    for number in range(args.num_samples):
        if number > 0:
            print(f"\n{'-' * 40}")
        print(sampler.encoding.decode(ids[1:]), end="", flush=True)
        for _, text in sampler.stream(
            ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            generator=generator,
        ):
            print(text, end="", flush=True)
        print()
    rate = args.num_samples * args.max_new_tokens / (time.perf_counter() - began)
    print(f"[{rate:,.0f} tokens/s on {sampler.device}]", file=sys.stderr)


def print_recall(sampler, questions, rows):
    """Ask all questions. Print the first `rows` of them and the accuracy for each attribute."""
    answers = answer_questions(sampler.model, questions, sampler.separator)
    shown = questions
    if rows > 0:
        shown = questions[:rows]
    width = max(len(question["prompt"]) for question in shown)
    print(f"{'prompt':{width}}  {'expected':24}  {'got':24}")
    for question, ids in zip(shown, answers, strict=False):
        got = " ".join(sampler.encoding.decode(ids).split())
        verdict = "wrong"
        if ids == question["answer_ids"]:
            verdict = "right"
        print(f"{question['prompt']:{width}}  {question['answer']:24}  {got:24}  {verdict}")
    if len(questions) > len(shown):
        print(f"... {len(questions) - len(shown):,} more (--rows=0 shows all)\n")
    print_accuracy(questions, answers)


def print_accuracy(questions, answers):
    right = {}  # attribute: list of truth values
    for question, ids in zip(questions, answers, strict=True):
        right.setdefault(question["attribute"], []).append(ids == question["answer_ids"])
    right["all"] = [value for values in right.values() for value in values]
    for attribute, values in right.items():
        print(f"{attribute:12} {sum(values) / len(values):6.1%} of {len(values):,}")


def main(argv):
    args = parse(argv)
    try:
        sampler = Sampler(args)
        if args.recall:
            questions = sampler.open_dataset(args.dataset).questions()
            if not questions:
                what = "--recall: the dataset has no questions (no recall.jsonl)"
                raise ValueError(f"{what}; prepare.py --questions=FILE adds them")
        else:
            ids = sampler.encode(args.start)
        sampler.apply(args.delta)
        with sampler.generating():
            if args.recall:
                print_recall(sampler, questions, args.rows)
            else:
                print_samples(sampler, ids, args)
    except (Exception, KeyboardInterrupt) as error:
        fail(error)


if __name__ == "__main__":
    ignore_stream_errors()
    print_strictly()
    main(sys.argv[1:])
