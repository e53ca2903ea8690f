"""Who reads a slot: the passages of the training data that read each slot with the largest weights. sample.py
--inspect shows them; they are kept beside the checkpoint, in readers.pt: for each slot READERS positions of
train.bin and their weights, no two of the same words."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.files import blame
from model import identity, read_checkpoint, save_checkpoint

FORMAT = "nanomem-readers-1"
READERS, WORDS, WINDOWS = 8, 7, 2**14  # kept for a slot; tokens by which passages differ; read at most


class Reads:
    """What tokens read, while this is a pool's `usage`: .layers gets (slots, weights), (n, k) each, from each
    memory layer in its turn. k = cores * heads * top-k. Weights are absolute: PEER's and UltraMem's have signs."""

    def __init__(self, config):
        self.k, self.layers = config.mem_cores * config.mem_heads * config.mem_topk, []

    def add(self, slots, weights):
        kinds = (slots, np.int64), (weights.detach().float().abs(), np.float32)
        self.layers.append([x.reshape(-1, self.k).cpu().numpy().astype(kind) for x, kind in kinds])

    def take(self):
        """What has been read since the last call."""
        layers, self.layers = self.layers, []
        return layers

    def last(self):
        """What the last token has read, in each layer: [(slots, shares of all weights)], the largest first."""
        shares = []
        for slots, weights in self.take():
            found, places = np.unique(slots[-1], return_inverse=True)  # heads can read the same slot
            total = np.bincount(places, weights[-1].astype(np.float64)) / max(weights[-1].sum(), 1e-30)
            order = np.argsort(-total, kind="stable")
            shares.append((found[order], total[order]))
        return shares


class Readers:
    """positions (S, READERS) int64, -1: none; weights (S, READERS) float32, the largest first."""

    def __init__(self, S):
        self.positions = np.full((S, READERS), -1)
        self.weights, self.words = np.zeros((S, READERS), np.float32), np.zeros((S, READERS), np.int64)

    def add(self, slots, weights, positions, words):
        """Reads of tokens at positions (n), which with what stands before hash to words (n). slots, weights (n, k)"""
        k = slots.shape[1]
        slots, weights, positions, words = slots.ravel(), weights.ravel(), positions.repeat(k), words.repeat(k)
        good = weights > self.weights[slots, -1]
        slots, weights, positions, words = (x[good] for x in (slots, weights, positions, words))
        known = np.unique(slots)
        columns = (slots, known.repeat(READERS)), (weights, self.weights[known].ravel())
        columns += (positions, self.positions[known].ravel()), (words, self.words[known].ravel())
        slots, weights, positions, words = map(np.concatenate, columns)
        order = np.lexsort((-weights, words, slots))  # the same words in the same slot: the largest weight stays
        new = np.diff(slots[order], prepend=-1) | np.diff(words[order], prepend=words[order][:1] - 1)
        order = order[new != 0]
        order = order[np.lexsort((positions[order], -weights[order], slots[order]))]
        starts = np.searchsorted(slots[order], known)
        rank = np.arange(len(order)) - starts[np.searchsorted(known, slots[order])]
        order, rank = order[rank < READERS], rank[rank < READERS]
        for table, x, empty in ((self.weights, weights, 0), (self.positions, positions, -1), (self.words, words, 0)):
            table[known] = empty
            table[slots[order], rank] = x[order]


def find_readers(model, windows, context):
    """One pass over the training data, or WINDOWS of its windows (dataset.Batches) -> Readers"""
    readers, reads, T = Readers(model.pool.S), Reads(model.config), windows.block_size
    prime, count = np.uint64(0x9E3779B97F4A7C15), min(len(windows), WINDOWS)
    model.pool.usage = reads
    for first in tqdm(range(0, count, 16), "who reads which slot", unit="batch", leave=False):
        numbers = range(first, min(first + 16, count))
        ids, starts = windows(numbers), [windows.start(number) for number in numbers]  # (B, T + 1), (B)
        words = np.zeros((len(ids), T), np.uint64)  # a hash of each token and those before it
        for shift in range(WORDS):
            words[:, shift:] = words[:, shift:] * prime + ids[:, : T - shift].astype(np.uint64) + np.uint64(1)
        with torch.no_grad(), context:
            model(torch.from_numpy(ids[:, :-1]).to(model.embedding.weight.device))
        positions = np.add.outer(starts, np.arange(T))
        for slots, weights in reads.take():
            readers.add(slots, weights, positions.ravel(), words.view(np.int64).ravel())
    model.pool.usage = None
    return readers


def open_readers(path, model, windows, context):
    """Those of a checkpoint, from the file readers.pt beside it; made anew if that is of other weights."""
    file, base = Path(path).with_name("readers.pt"), identity(model.state_dict())
    readers = Readers(model.pool.S)
    if file.exists():
        saved = read_checkpoint(file, "list of readers", FORMAT)
        with blame(f"{file} is damaged", "remove it: it will be made anew"):
            if saved["base"] == base:
                readers.positions, readers.weights = saved["positions"].numpy(), saved["weights"].numpy()
                if readers.positions.max() >= len(windows.ids) - 1 or len(readers.positions) != model.pool.S:
                    raise ValueError("positions that are not there")
                return readers
    readers = find_readers(model, windows, context)
    tensors = {name: torch.from_numpy(getattr(readers, name)) for name in ("positions", "weights")}
    save_checkpoint(file, {"format": FORMAT, "base": base, **tensors})
    return readers


def passage(ids, position, encoding, separator):
    """The sentence up to the token at a position, and the token that follows: two texts."""
    before = ids[max(0, position - 2 * WORDS) : position + 1].tolist()
    if separator in before[:-1]:
        before = before[-before[::-1].index(separator, 1) :]
    sentence = encoding.decode(before).rstrip("\n").rpartition("\n")[2]
    return sentence.strip(), encoding.decode([int(ids[position + 1])])
