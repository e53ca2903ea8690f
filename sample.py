"""Text from a checkpoint, or answers to the closed-book questions of its dataset.

python sample.py                               samples from the default run, out/facts-memory
python sample.py --start="Once upon a"         continue a text; FILE:path reads a file, - standard input
python sample.py --recall                      ask for the facts in words that training did not use
python sample.py --inspect --start="Once"      and say which slots each token reads, and who else does
python sample.py --recall --dataset=facts-new --delta=out/facts-new/delta.pt      with an update applied
"""

import argparse
import codecs
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -I leaves it out
from data.checkpoint import apply_deltas
from data.dataset import Dataset, find_folder, make_encoding
from data.files import blame, enough_memory, one_line, steady_streams
from data.readers import open_readers, reads_printer
from runtime.device import choose_device, precision
from train import answer, load_checkpoint


def parse(argv):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--out_dir", default="out/facts-memory", help="folder of the run (default: %(default)s)")
    add(
        "--start",
        default="",
        help="text to continue; FILE:path reads it from a file, - from standard input",
    )
    add("--num_samples", type=int, default=3, help="how many texts (default: 3; with --inspect 1)")
    add(
        "--max_new_tokens",
        type=int,
        default=200,
        help="tokens of each (default: 200; with --inspect 8)",
    )
    add("--temperature", type=float, default=0.8, help="0: greedy (default: 0.8; with --inspect 0)")
    add("--top_k", type=int, default=None, help="draw among the k likeliest tokens only")
    add(
        "--top_p",
        type=float,
        default=None,
        help="nucleus sampling: among the fewest tokens that hold p",
    )
    add("--seed", type=int, default=1, help="of the draws (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, mps (default: the fastest there is)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="default: %(default)s",
    )
    add("--recall", action="store_true", help="ask the dataset's closed-book questions instead")
    add(
        "--rows",
        type=int,
        default=20,
        help="questions shown in that table, 0: all (default: %(default)s)",
    )
    add("--dataset", default=None, help="of these questions or readers (default: that of the run)")
    add(
        "--delta",
        default=None,
        help="updates to apply, FILE[,FILE]: delta.pt of train.py --update=memory",
    )
    add(
        "--inspect",
        action="store_true",
        help="what each new token reads in the memory, and who else",
    )
    add("--json", action="store_true", help="with --inspect: one JSON object a token")
    if "--inspect" in argv:
        parser.set_defaults(num_samples=1, max_new_tokens=8, temperature=0.0)
    args = parser.parse_args(argv)
    if (args.json and not args.inspect) or (args.inspect and args.recall):
        parser.error("--json is for --inspect, and that for --start=TEXT")
    if args.dataset is not None and not (args.recall or args.inspect):
        parser.error(f"--dataset={args.dataset}: is for --recall and --inspect")
    if args.delta is not None and "" in args.delta.split(","):
        parser.error(f"--delta={args.delta}: a file has no name; is it a variable that is not set?")
    for name in ("num_samples", "max_new_tokens", "top_k", "temperature", "top_p", "seed", "rows"):
        low = int(name in ("num_samples", "max_new_tokens", "top_k"))
        value, high = getattr(args, name), {"top_p": 1, "seed": 2**63 - 1}.get(name, 10**9)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name}={value}: must be from {low} to {high}")
    return args


def read_start(start):
    if start != "-" and not start.startswith("FILE:"):
        return start
    file = 0 if start == "-" else start[5:]
    with blame(f"--start={start}", "it must be UTF-8 text"), open(file, encoding="utf-8") as text:
        return text.read()


def sample(model, encoding, separator, ids, args, print_reads=None):
    """Print num_samples continuations of the text that ids stand for, each token as soon as it is drawn.
    print_reads: with --inspect, what is called with a token's text instead."""
    device = next(model.parameters()).device
    ids = ids if ids[:1] == [separator] else [separator, *ids]  # as at the beginning of a document
    prompt = torch.tensor([ids], device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    options = args.max_new_tokens, args.temperature, args.top_k, args.top_p, generator
    began = time.perf_counter()
    for number in range(args.num_samples):
        if not args.json:
            print(f"\n{'-' * 40}\n" * (number > 0) + encoding.decode(ids[1:]), end="", flush=True)
        characters = codecs.getincrementaldecoder("utf-8")(
            "replace"
        )  # a token can end within a character
        for token in model.stream(prompt, *options):
            text = characters.decode(encoding.decode_single_token_bytes(token.item()))
            print_reads(text) if print_reads else print(text, end="", flush=True)
        if not args.json:
            print(characters.decode(b"", final=True))
    rate = args.num_samples * args.max_new_tokens / (time.perf_counter() - began)
    print(f"[{rate:,.0f} tokens/s on {device}]", file=sys.stderr)


def print_recall(model, encoding, separator, questions, rows):
    """Ask all questions; show the first of them, and the accuracy for each kind."""
    shown, score = questions[: rows or None], {}
    width = max(len(q["prompt"]) for q in shown)
    print(f"{'prompt':{width}}  {'expected':24}  {'got':24}")
    for i, (question, ids) in enumerate(
        zip(questions, answer(model, questions, separator), strict=True)
    ):
        right = ids == question["answer_ids"]
        score.setdefault(question["attribute"], []).append(right)
        if i < len(shown):
            got, verdict = " ".join(encoding.decode(ids).split()), "right" if right else "wrong"
            print(f"{question['prompt']:{width}}  {question['answer']:24}  {got:24}  {verdict}")
    more = len(questions) - len(shown)
    print(f"... {more:,} more (--rows=0 shows all)\n" if more else "")
    score["all"] = [right for results in score.values() for right in results]
    for attribute, results in score.items():
        print(f"{attribute:12} {sum(results) / len(results):6.1%} of {len(results):,}")


@one_line("sample.py")
def main(argv):
    args = parse(argv)
    path, device = Path(args.out_dir, "ckpt.pt"), choose_device(args.device)
    checkpoint = load_checkpoint(path, device)
    model, separator = checkpoint["model"], checkpoint["separator"]
    with blame(path, "give another --out_dir"):
        encoding = make_encoding(checkpoint["vocabulary"])
        if encoding.n_vocab != (size := model.config.vocab_size):
            raise ValueError(f"{encoding.n_vocab} tokens in its vocabulary, {size} in its model")
    print_reads, context = None, precision(args.dtype, device)
    if args.recall or args.inspect:
        dataset = Dataset(find_folder(args.dataset or checkpoint["train_config"]["dataset"]))
        name, questions = "--recall" if args.recall else "--inspect", dataset.questions()
        if not args.dataset and dataset.fingerprint() != checkpoint["fingerprint"]:
            raise ValueError(f"{name}: {dataset.folder} is not what this checkpoint was trained on")
        if dataset.vocabulary() != checkpoint["vocabulary"]:
            raise ValueError(f"--dataset={args.dataset}: its vocabulary is not that of {path}")
        if args.recall and not questions:
            raise ValueError(
                f"--recall: {dataset.folder} has no recall.jsonl, so no questions to ask"
            )
    if args.inspect:
        if model.pool is None:
            raise ValueError(f"--inspect: the model in {path} has no memory")
        print_reads = reads_printer(
            model, encoding, open_readers(path, model, dataset, context), args.json
        )
    if args.delta:
        apply_deltas(model, path, args.delta.split(","))
    text = read_start(args.start)
    with blame("--start", f"the vocabulary in {path} cannot take it"):
        ids = encoding.encode(text, allowed_special="all")
    named = blame(f"{path} cannot be sampled from", "give another --out_dir")
    with named, enough_memory(), context:
        try:
            if args.recall:
                print_recall(model, encoding, separator, questions, args.rows)
            else:
                sample(model, encoding, separator, ids, args, print_reads)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed at exit
            if not isinstance(error, BrokenPipeError):  # a reader, say head, who has seen enough
                raise OSError(f"standard output: {error}") from None


if __name__ == "__main__":
    steady_streams()
    parse(sys.argv[1:])  # says what is wrong with them, or --help
    sys.stdout = open(1, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
    main(sys.argv[1:])
