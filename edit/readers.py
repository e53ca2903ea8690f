"""The readers of a slot: the passages of the training data that read it with the largest weights.
edit/inspect_slots.py shows them. The file readers.pt beside the checkpoint keeps them.

Letters: S slots, n tokens, k slots that a token reads in a layer (all cores and heads), R =
READERS, T time."""

import sys

import numpy as np
import torch

from data.dataset import make_encoding, open_dataset
from edit.delta import weights_hash
from runtime.bars import Bar
from runtime.checkpoint import read_tensors, save_tensors
from runtime.files import explain_errors

FORMAT = "nanomem-readers-2"
READERS = 8  # per slot
WORDS = 7  # last tokens, which tell passages apart
MOST_WINDOWS = 2**14  # windows of the training data to read, at most


class Reads:
    """Records what tokens read while it is a pool's `usage`. Each memory layer in turn adds slots
    and absolute weights, (n, k) each."""

    def __init__(self, config):
        self.k = config.mem_cores * config.mem_heads * config.mem_topk
        self.layers = []

    def add(self, slots, weights):
        slots = slots.reshape(-1, self.k)
        weights = weights.detach().float().abs().reshape(-1, self.k)
        if not weights.isfinite().all():
            raise ValueError("the weights of slots are not finite")
        self.layers.append((slots.cpu().numpy().astype(np.int64), weights.cpu().numpy()))

    def take(self):
        """Return what was added since the last call: (slots, weights) for each layer."""
        layers = self.layers
        self.layers = []
        return layers

    def last_token(self):
        """Return for each layer the slots that the last token has read, and their shares of its
        weights, largest first."""
        result = []
        for slots, weights in self.take():
            found, places = np.unique(slots[-1], return_inverse=True)  # several heads can read one
            weights = weights[-1].astype(np.float64)
            shares = np.bincount(places, weights / max(weights.sum(), 1e-30))
            order = np.argsort(-shares, kind="stable")
            result.append((found[order].tolist(), shares[order].tolist()))
        return result


class Readers:
    """The R tokens that read each slot with the largest weights, no two with the same words.

    weights (S, R) float32, largest first; positions (S, R) int64 of the tokens in train.bin, or
    -1; words (S, R) int64, hashes of their passages"""

    def __init__(self, slots):
        self.weights = np.zeros((slots, READERS), np.float32)
        self.positions = np.full((slots, READERS), -1)
        self.words = np.zeros((slots, READERS), np.int64)

    def add(self, slots, weights, positions, words):
        """Add n tokens at positions (n), with words (n), that read slots with weights (n, k)."""
        k = slots.shape[1]
        slots = slots.ravel()
        weights = weights.ravel()
        positions = positions.repeat(k)
        words = words.repeat(k)
        better = weights > self.weights[slots, -1]
        changed = np.unique(slots[better])
        # the new readers of these slots, and those known so far
        slots = np.concatenate([slots[better], changed.repeat(READERS)])
        weights = np.concatenate([weights[better], self.weights[changed].ravel()])
        positions = np.concatenate([positions[better], self.positions[changed].ravel()])
        words = np.concatenate([words[better], self.words[changed].ravel()])
        best = self.best_of(slots, weights, positions, words)
        slots = slots[best]
        rank = np.arange(len(slots)) - np.searchsorted(slots, slots)  # 0, 1, ... in each slot
        kept = rank < READERS
        best = best[kept]
        place = (slots[kept], rank[kept])
        self.weights[changed] = 0
        self.positions[changed] = -1
        self.words[changed] = 0
        self.weights[place] = weights[best]
        self.positions[place] = positions[best]
        self.words[place] = words[best]

    @staticmethod
    def best_of(slots, weights, positions, words):
        """Return indices sorted by slot, then by weight, largest first. If words repeat in a slot,
        keep only the largest weight."""
        order = np.lexsort((positions, -weights, words, slots))
        first = np.ones(len(order), bool)
        new_slot = np.diff(slots[order]) != 0
        new_words = np.diff(words[order]) != 0
        first[1:] = new_slot | new_words
        order = order[first]
        return order[np.lexsort((positions[order], -weights[order], slots[order]))]


def hash_passages(ids, starts_passage):
    """Hash each token together with up to WORDS - 1 tokens before it in its passage.

    ids (B, T); starts_passage (vocab_size) bool: tokens that a passage follows -> (B, T) int64"""
    T = ids.shape[1]
    factor = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit is lost
    begin = np.zeros(ids.shape, np.int64)  # where the passage of a token begins
    begin[:, 1:] = np.arange(1, T) * starts_passage[ids[:, :-1]]
    begin = np.maximum.accumulate(begin, axis=1)
    words = np.zeros(ids.shape, np.uint64)
    for shift in reversed(range(WORDS)):
        before = ids[:, : T - shift].astype(np.uint64)
        hashed = words[:, shift:] * factor + before + np.uint64(1)
        in_passage = begin[:, shift:] <= np.arange(T - shift)
        words[:, shift:] = np.where(in_passage, hashed, words[:, shift:])
    return words.view(np.int64)


@torch.no_grad()
def find_readers(readers, model, windows, starts_passage, context):
    """Read the training data once, or MOST_WINDOWS of its windows (dataset.Batches), and add the
    reads to readers."""
    reads = Reads(model.config)
    device = model.embedding.weight.device
    count = min(len(windows), MOST_WINDOWS)
    model.pool.usage = reads
    for first in Bar(range(0, count, 16), "who reads which slot", unit="batch", leave=False):
        numbers = range(first, min(first + 16, count))
        ids = windows.windows(numbers)[:, :-1]  # (B, T)
        with context:
            model(torch.from_numpy(ids).to(device))
        starts = [windows.start(number) for number in numbers]
        positions = np.add.outer(starts, np.arange(ids.shape[1])).ravel()
        words = hash_passages(ids, starts_passage).ravel()
        for slots, weights in reads.take():
            readers.add(slots, weights, positions, words)
    model.pool.usage = None


def open_readers(path, model, dataset, context):
    """Return the Readers of a checkpoint, before any delta, and the token ids of the training data.
    They come from the file beside the checkpoint, made anew if weights or data have changed."""
    windows = open_dataset(dataset.folder, model.config.block_size, 0)["train_eval"]
    file = path.with_name("readers.pt")
    base = f"{weights_hash(model.state_dict())} {dataset.fingerprint()}"
    readers = Readers(model.pool.slots)
    if file.exists():
        try:
            if load_readers(readers, file, base, len(windows.ids)):
                return readers, windows.ids
        except ValueError as error:
            print(f"{error}: reading the training data again", file=sys.stderr)
    find_readers(readers, model, windows, passage_ends(dataset), context)
    tensors = {
        "positions": torch.from_numpy(readers.positions),
        "weights": torch.from_numpy(readers.weights),
    }
    content = {"format": FORMAT, "base": base, "hash": weights_hash(tensors), **tensors}
    try:
        save_tensors(file, content)
    except OSError as error:  # the readers can be shown all the same
        print(f"{error}: the next call reads the data again", file=sys.stderr)
    return readers, windows.ids


def load_readers(readers, file, base, tokens):
    """Fill in readers from a file. Returns whether they belong to base, weights and data. tokens:
    the number of them in train.bin. Raises ValueError, naming the file, if it is damaged."""
    hint = "it will be made anew"
    saved = read_tensors(file, "list of readers", FORMAT, hint)
    with explain_errors(f"{file} is damaged", hint):
        tensors = {name: saved[name].clone() for name in ("positions", "weights")}
        if saved["hash"] != weights_hash(tensors):
            raise ValueError("its numbers are not those that were saved")
        if saved["base"] != base:
            return False
        positions = tensors["positions"].numpy()
        weights = tensors["weights"].numpy()
        if not positions.shape == weights.shape == readers.positions.shape:
            raise ValueError("it is of another memory")
        if positions.min() < -1 or positions.max() >= tokens - 1:
            raise ValueError("it has positions that do not exist")
        readers.positions = positions
        readers.weights = weights
    return True


def passage_ends(dataset):
    """(vocab_size) bool: the tokens that end a passage, the separator and ends of lines"""
    encoding = make_encoding(dataset.vocabulary())
    ends = np.zeros(encoding.n_vocab, bool)
    for i in range(encoding.n_vocab):
        ends[i] = encoding.decode_bytes([i]).endswith(b"\n")
    ends[dataset.separator] = True
    return ends


def passage(ids, position, encoding):
    """Return two texts: the sentence up to the token at a position, and the next token."""
    first = max(0, position - 2 * WORDS)
    before = encoding.decode(ids[first : position + 1].tolist())
    for end in (*encoding.special_tokens_set, "\n"):
        before = before.removesuffix(end).rpartition(end)[2]
    return before.strip(), encoding.decode([int(ids[position + 1])])
