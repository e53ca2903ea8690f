"""Which n-grams read a row of an n-gram memory (systems/engram.py). edit/inspect_slots.py shows
them. Rows depend on tokens alone, so this needs no forward pass.

Only the first of several heads is shown. Only MOST_TOKENS of the training data are searched.
Letters: T time, N longest n-gram."""

import numpy as np
import torch

from data.dataset import open_dataset
from systems.engram import make_ngrams

MOST_TOKENS = 2**22  # of the training data to search, at most
PIECE = 2**16  # tokens that are hashed at a time
SHOWN_NGRAMS = 4  # that read a row


class NgramInspector:
    """Shows the rows that n-gram memories read, and which n-grams of the training data read them.
    It records gates while it is the pool's `usage`."""

    name = "ngrams"

    def __init__(self, sampler, dataset):
        self.encoding = sampler.encoding
        self.config = sampler.model.config
        self.device = sampler.device
        self.layers = {i: sampler.model.blocks[i].ngram for i in self.config.ngram_layers}
        self.gates = []  # of the last token in the last pass, one a layer
        windows = open_dataset(dataset.folder, self.config.block_size, 0)["train_eval"]
        self.read_training_data(windows.ids[:MOST_TOKENS])
        sampler.model.ngram_pool.usage = self

    def read_training_data(self, ids):
        """Keep its n-grams (T, N), the latest token first, and {block: their rows (T, orders)}."""
        history = self.config.ngram_order - 1
        ngrams = []
        rows = {i: [] for i in self.layers}
        for start in range(0, len(ids), PIECE):
            first = max(0, start - history)  # with the tokens before the piece
            tokens = self.ngrams_of(ids[first : start + PIECE])[start - first :]
            ngrams.append(tokens.cpu().numpy().astype(np.int32))
            for i, layer in self.layers.items():
                rows[i].append(self.rows_of(layer, tokens))
        self.ngrams = np.concatenate(ngrams)
        self.rows = {i: np.concatenate(pieces) for i, pieces in rows.items()}

    def ngrams_of(self, ids):
        """Token ids (T,) -> (T, N), the latest first"""
        c = self.config
        tokens = torch.from_numpy(np.array(ids, dtype=np.int64)).to(self.device)
        ngrams = make_ngrams(tokens.unsqueeze(0), c.ngram_order, c.separator, pad=c.vocab_size)
        return ngrams[0]

    def rows_of(self, layer, tokens):
        """(T, N) -> the rows of the first of J heads, for each order: (T, orders)"""
        return layer.rows(tokens)[:, :: layer.J].cpu().numpy()

    def add(self, rows, gates):
        """The layers call this in turn. gates (B, T, M), of bigrams the strength, are equal for all
        M rows of a token."""
        self.gates.append(gates[0, -1, 0].item())

    def reads_of_last_token(self, ids):
        """What the last of these token ids has read, by layer and order: the n-gram, its row, and
        which n-grams of the training data read this row. Call it after each forward pass."""
        found = []
        tokens = self.ngrams_of(ids[-self.config.ngram_order :])[-1:]  # (1, N)
        for (block, layer), gate in zip(self.layers.items(), self.gates, strict=True):
            rows = self.rows_of(layer, tokens)[0]
            for column, n in enumerate(layer.orders):
                read = {"block": block, "gate": gate, "order": n}
                read["ngram"] = self.text(tokens[0, :n])
                read["row"] = int(rows[column])
                reads_row = self.rows[block][:, column] == rows[column]
                read["readers"] = self.count(self.ngrams[reads_row, :n])
                found.append(read)
        self.gates = []
        return found

    def count(self, ngrams):
        """N-grams (P, n) -> [text, count] of each, most frequent first"""
        distinct, counts = np.unique(ngrams, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [[self.text(distinct[i]), int(counts[i])] for i in order]

    def text(self, tokens):
        """An n-gram, the latest token first -> its text"""
        ids = [int(token) for token in tokens if token != self.config.vocab_size]
        return self.encoding.decode(ids[::-1])

    def print(self, found):
        block = None
        shown = set()  # rows; bigram layers share them
        for read in found:
            if read["block"] != block:
                block = read["block"]
                print(f"\n  before block {block}, gate {read['gate']:.2f}", end="")
            if read["row"] in shown:
                print(", the same row", end="")
                continue
            shown.add(read["row"])
            readers = [f"{text!r} ({count:,})" for text, count in read["readers"]]
            names = ", ".join(readers[:SHOWN_NGRAMS]) or "nobody"
            more = len(readers) - SHOWN_NGRAMS
            if more > 0:
                names += f", and {more:,} more"
            place = f"{read['ngram']!r} reads row {read['row']:,} of {read['order']}-grams"
            print(f"\n      {place}, read by {names}", end="")
