"""Who reads a slot: the passages of the training data that read it with the largest weights, which sample.py
--inspect shows. Kept beside the checkpoint, in readers.pt: READERS positions in train.bin for each slot."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.checkpoint import identity, read_checkpoint, save_checkpoint
from data.dataset import make_encoding, open_dataset
from data.files import blame

FORMAT = "nanomem-readers-1"
READERS, WORDS, WINDOWS = (
    8,
    7,
    2**14,
)  # of a slot; tokens by which passages differ; windows read at most


class Reads:
    """What tokens read, while this is a pool's `usage`: each memory layer in its turn adds slots and absolute
    weights, (n, k) each, to .layers. k = cores * heads * top-k"""

    def __init__(self, config):
        self.k, self.layers = config.mem_cores * config.mem_heads * config.mem_topk, []

    def add(self, slots, weights):
        kinds = (slots, np.int64), (weights.detach().float().abs(), np.float32)
        self.layers.append([x.reshape(-1, self.k).cpu().numpy().astype(kind) for x, kind in kinds])

    def take(self):
        """What has been added since the last call."""
        layers, self.layers = self.layers, []
        return layers

    def last(self):
        """For each layer the slots that the last token has read, and their shares of its weights."""
        result = []
        for slots, weights in self.take():
            found, places = np.unique(
                slots[-1], return_inverse=True
            )  # several heads can read a slot
            shares = np.bincount(
                places, weights[-1].astype(np.float64) / max(weights[-1].sum(), 1e-30)
            )
            order = np.argsort(-shares, kind="stable")
            result.append((found[order].tolist(), shares[order].tolist()))
        return result


class Readers:
    """positions (S, READERS) int64, of the tokens that read a slot most, no two of the same words, or -1;
    weights (S, READERS) float32, theirs, largest first."""

    def __init__(self, S):
        self.weights, self.positions = np.zeros((S, READERS), np.float32), np.full((S, READERS), -1)
        self.words = np.zeros((S, READERS), np.int64)

    def add(self, slots, weights, positions, words):
        """Tokens at positions (n), words (n) the hashes of their passages, read slots with weights (n, k)."""
        new = (
            slots.ravel(),
            weights.ravel(),
            *(x.repeat(slots.shape[1]) for x in (positions, words)),
        )
        new = [x[new[1] > self.weights[new[0], -1]] for x in new]
        known, tables = np.unique(new[0]), (self.weights, self.positions, self.words)
        old = known.repeat(READERS), *(table[known].ravel() for table in tables)
        slots, weights, positions, words = map(np.concatenate, zip(new, old, strict=True))
        order = np.lexsort(
            (positions, -weights, words, slots)
        )  # of the same words the largest weight stays
        first = np.ones(len(order), bool)
        first[1:] = (np.diff(slots[order]) != 0) | (np.diff(words[order]) != 0)
        order = order[first]
        order = order[np.lexsort((positions[order], -weights[order], slots[order]))]
        rank = np.arange(len(order)) - np.searchsorted(slots[order], slots[order])
        order, rank = order[rank < READERS], rank[rank < READERS]
        for table, x, empty in zip(tables, (weights, positions, words), (0, -1, 0), strict=True):
            table[known] = empty
            table[slots[order], rank] = x[order]


def find_readers(readers, model, windows, ends, context):
    """One pass over the training data, or WINDOWS of its windows (dataset.Batches), adds them to readers.
    ends (vocab_size) bool: tokens after which a passage begins."""
    reads, T = Reads(model.config), windows.block_size
    prime, count = np.uint64(0x9E3779B97F4A7C15), min(len(windows), WINDOWS)
    model.pool.usage = reads
    for first in tqdm(range(0, count, 16), "who reads which slot", unit="batch", leave=False):
        numbers = range(first, min(first + 16, count))
        ids, starts = (
            windows(numbers),
            [windows.start(number) for number in numbers],
        )  # (B, T + 1), (B)
        words, begins = np.zeros((len(ids), T), np.uint64), np.zeros((len(ids), T), np.int64)
        begins[:, 1:] = np.maximum.accumulate(np.arange(1, T) * ends[ids[:, : T - 1]], axis=1)
        for shift in reversed(
            range(WORDS)
        ):  # the hash of a token and those before it in its passage
            hashed = words[:, shift:] * prime + ids[:, : T - shift].astype(np.uint64) + np.uint64(1)
            same = begins[:, shift:] <= np.arange(T - shift)
            words[:, shift:] = np.where(same, hashed, words[:, shift:])
        with torch.no_grad(), context:
            model(torch.from_numpy(ids[:, :-1]).to(model.embedding.weight.device))
        positions = np.add.outer(starts, np.arange(T)).ravel()
        for slots, weights in reads.take():
            readers.add(slots, weights, positions, words.view(np.int64).ravel())
    model.pool.usage = None


def open_readers(path, model, dataset, context):
    """Readers of a checkpoint, before any delta, and the token ids that they are positions of. From the file
    beside it, which is made anew if it is of other weights or data."""
    windows = open_dataset(dataset.folder, model.config.block_size, 0)["train_eval"]
    file, readers = Path(path).with_name("readers.pt"), Readers(model.pool.slots)
    readers.ids, base = windows.ids, f"{identity(model.state_dict())} {dataset.fingerprint()}"
    if file.exists():
        saved = read_checkpoint(file, "list of readers", FORMAT)
        with blame(f"{file} is damaged", "remove it: it will be made anew"):
            if saved["base"] == base:
                positions, weights = saved["positions"].numpy(), saved["weights"].numpy()
                if (
                    positions.shape != readers.positions.shape
                    or positions.max() >= len(windows.ids) - 1
                ):
                    raise ValueError("it has positions that are not there")
                readers.positions, readers.weights = positions, weights
                return readers
    encoding = make_encoding(dataset.vocabulary())
    texts = [encoding.decode_bytes([i]) for i in range(encoding.n_vocab)]
    ends = np.array(
        [i == dataset.separator or text.endswith(b"\n") for i, text in enumerate(texts)]
    )
    find_readers(readers, model, windows, ends, context)
    tensors = {name: torch.from_numpy(getattr(readers, name)) for name in ("positions", "weights")}
    try:
        save_checkpoint(file, {"format": FORMAT, "base": base, **tensors})
    except (
        OSError
    ) as error:  # a folder that is only to be read: what was found can be shown all the same
        print(f"{error}: the next --inspect reads the data again", file=sys.stderr)
    return readers


def passage(ids, position, encoding):
    """The sentence up to the token at a position, and the token that follows: two texts."""
    before = encoding.decode(ids[max(0, position - 2 * WORDS) : position + 1].tolist())
    for end in (*encoding.special_tokens_set, "\n"):
        before = before.removesuffix(end).rpartition(end)[2]
    return before.strip(), encoding.decode([int(ids[position + 1])])


def reads_printer(model, encoding, readers, as_json):
    """A function that prints, for the token that a model has just given, the slots that were read most in
    each layer, their share of all weights, and the passages of the training data that read these most."""
    model.pool.usage = reads = Reads(model.config)

    def print_reads(text):
        layers = []
        for block, (slots, shares) in zip(model.config.mem_layers, reads.last(), strict=True):
            for slot, share in [*zip(slots, shares, strict=True)][: None if as_json else 3]:
                positions = [
                    position for position in readers.positions[slot].tolist() if position >= 0
                ]
                passages = [passage(readers.ids, position, encoding) for position in positions]
                layers.append({"block": block, "slot": slot, "share": share, "readers": passages})
        if as_json:
            print(json.dumps({"token": text, "reads": layers}))
            return
        print(f"\n\n{text!r}")
        for read in layers:
            head = f"  block {read['block']}, slot {read['slot']:,}, {read['share']:.1%} of weights, read by"
            passages = dict.fromkeys(" →".join(texts).strip("\n") for texts in read["readers"])
            print("\n      ".join([head, *passages][:5]))

    return print_reads
