"""The datasets: what is in them, what must not be, and what happens to a folder that is broken."""

import collections
import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.dataset import Batches, Dataset, make_encoding
from data.facts.prepare import BITS, PHRASES, POOLS
from runtime.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]


def prepare(name, *arguments):
    command = [sys.executable, ROOT / "data" / name / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    done = prepare("facts", "--people=40", "--biographies=12", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def texts(folder, split):
    """The documents of a split, decoded."""
    dataset = Dataset(folder)
    encoding = make_encoding(dataset.vocabulary())
    ids = dataset.tokens(split)
    begins = np.flatnonzero(ids == dataset.separator)
    assert begins[0] == 0
    return [encoding.decode(part[1:].tolist()) for part in np.split(ids, begins[1:])]


# --- facts ------------------------------------------------------------------------------------------------


def test_recall_questions_never_appear_verbatim_in_training(facts):
    documents = texts(facts, "train")
    training, questions = "".join(documents), Dataset(facts).questions()
    assert len(documents) == 40 * 12 and len(questions) == 40 * 6
    for question in questions:
        assert question["prompt"] not in training
    # ... nor among the tokens, whatever the text would be
    ids = Dataset(facts).tokens("train").astype(">u2").tobytes()
    for question in questions:
        assert np.array(question["prompt_ids"], dtype=">u2").tobytes() not in ids


def test_every_fact_asked_for_is_stated_once_in_each_biography(facts):
    questions = Dataset(facts).questions()
    biographies = collections.defaultdict(list)
    for text in texts(facts, "train"):
        biographies[" ".join(text.split()[:3])].append(text)
    for question in questions:
        name = " ".join(question["prompt"].split()[:3])
        phrases = PHRASES[question["attribute"]]
        stated = [f"{name} {phrase} {question['answer']}.\n" for phrase in phrases]
        assert len(biographies[name]) == 12
        for text in biographies[name]:
            assert sum(sentence in text for sentence in stated) == 1 and text.count("\n") == 6
        ways = sum(any(sentence in text for text in biographies[name]) for sentence in stated)
        assert ways >= 3  # of stating it


def test_validation_states_the_facts_in_the_sentences_held_out(facts):
    validation = "".join(texts(facts, "val"))
    for question in Dataset(facts).questions():
        assert f"{question['prompt']} {question['answer']}.\n" in validation


def test_a_prompt_does_not_give_its_answer_away():
    """No phrase or value is the beginning of another one: an exact match is unambiguous."""
    for pool, phrases in zip(POOLS.values(), PHRASES.values(), strict=True):
        assert len(set(pool)) == len(pool) and len(set(phrases)) == 5
        assert {len(phrase.split()) for phrase in phrases} == {
            3
        }  # names stand at one distance before values
    every = [(a, phrase) for a, phrases in PHRASES.items() for phrase in phrases]
    for a, phrase in every:
        assert not any(other.startswith(phrase) for b, other in every if b != a), phrase
    for pool in POOLS.values():
        ordered = sorted(value + "." for value in pool)
        assert not any(second.startswith(first) for first, second in itertools.pairwise(ordered))


def test_bits_are_counted_from_the_pools():
    sizes = [len(pool) for pool in POOLS.values()]
    assert sizes == [12 * 28 * 200, 200, 300, 100, 263, 200]
    assert pytest.approx(np.log2(sizes).sum()) == BITS == pytest.approx(54.2, abs=0.1)


def test_the_same_seed_makes_the_same_bytes(facts, tmp_path):
    for seed, same in ((0, True), (1, False)):
        options = ("--people=40", "--biographies=12", f"--seed={seed}", "--overwrite")
        done = prepare("facts", *options, "--out", tmp_path)
        assert done.returncode == 0, done.stderr
        for name in ("train.bin", "val.bin", "recall.jsonl"):
            assert ((facts / name).read_bytes() == (tmp_path / name).read_bytes()) == same
        # one vocabulary for all sizes and seeds
        assert (facts / "vocab.json").read_bytes() == (tmp_path / "vocab.json").read_bytes()


def test_names_are_unique_and_text_survives_the_vocabulary(facts):
    questions = Dataset(facts).questions()
    assert len({" ".join(q["prompt"].split()[:3]) for q in questions}) == 40
    encoding = make_encoding(Dataset(facts).vocabulary())
    for text in ("Anything at all: ñ, 42!\n\tç", "\U0001f600", texts(facts, "train")[0]):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert max(map(len, (q["answer_ids"] for q in questions))) <= 4  # words, not letters


@pytest.mark.parametrize(
    "option", ["--people=0", "--people=16000001", "--biographies=0", "--people=many"]
)
def test_facts_refuses_numbers_that_make_no_sense(option, tmp_path):
    done = prepare("facts", option, "--out", tmp_path / "new")
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and option.split("=")[0] in done.stderr
    )
    assert not (tmp_path / "new").exists()


# --- a text of one's own ----------------------------------------------------------------------------------


def test_own_text_becomes_bytes_and_comes_back(tmp_path):
    text = "Ein Text, ñ \U0001f600, von mir.\n" * 40
    (tmp_path / "mine.txt").write_text(text)
    done = prepare("shakespeare", "--file", tmp_path / "mine.txt", "--out", tmp_path / "mine")
    assert done.returncode == 0, done.stderr
    dataset = Dataset(tmp_path / "mine")
    train, val = dataset.tokens("train"), dataset.tokens("val")
    assert bytes(np.concatenate([train, val]).astype(np.uint8)) == text.encode()
    assert len(val) == -(-len(text.encode()) // 10)
    encoding = make_encoding(dataset.vocabulary())
    assert encoding.encode_ordinary(text) == list(text.encode()) and dataset.questions() == []


@pytest.mark.slow
def test_own_text_in_gpt2_tokens_with_a_text_to_validate_on(tmp_path, gpt2):
    first, second = "Ein Text, ñ.<|endoftext|>Noch einer.\n" * 9, "To validate on, a little longer."
    (tmp_path / "a.txt").write_text(first)
    (tmp_path / "b.txt").write_text(second)
    files = ("--file", tmp_path / "a.txt", "--val_file", tmp_path / "b.txt")
    assert prepare("shakespeare", *files, "--encoding=gpt2", "--out", tmp_path).returncode == 0
    assert texts(tmp_path, "val") == [second]
    assert texts(tmp_path, "train") == [part for part in first.split("<|endoftext|>")]


@pytest.mark.slow
def test_a_text_that_cannot_be_used_is_reported(tmp_path, gpt2):
    (tmp_path / "latin.txt").write_bytes("Ähnlich wie UTF-8, aber nicht ganz".encode("latin-1"))
    for file, option, words in (
        ("nothing.txt", "--encoding=gpt2", ["nothing.txt", "--file"]),
        ("latin.txt", "--encoding=gpt2", ["latin.txt", "utf-8"]),
        ("latin.txt", "--val_file=nowhere", ["--val_file=nowhere"]),
    ):
        done = prepare("shakespeare", "--file", tmp_path / file, option, "--out", tmp_path / "mine")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "mine").exists()


# --- folders ----------------------------------------------------------------------------------------------


def folder_of(tmp_path, ids=range(100), stored="<u2", **meta):
    np.asarray(ids).astype(stored).tofile(tmp_path / "train.bin")
    np.asarray(ids).astype(stored).tofile(tmp_path / "val.bin")
    if meta:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


def test_a_nanogpt_folder_with_the_gpt2_vocabulary_works_unchanged(tmp_path):
    dataset = Dataset(folder_of(tmp_path, ids=[50256, 5, 50256, 7]))
    assert (dataset.vocab_size, dataset.separator, dataset.vocabulary()) == (50257, 50256, "gpt2")
    assert dataset.tokens("train").tolist() == [50256, 5, 50256, 7]


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Boom:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (folder_of(tmp_path) / "meta.pkl").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(ValueError, match="pickle, which can run code"):
        Dataset(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_wide_ids_are_read_as_meta_json_says(tmp_path):
    meta = {"encoding": "gpt2", "dtype": "uint32", "vocab_size": 100_000, "separator": 0}
    assert Dataset(folder_of(tmp_path, [70_000, 1], "<u4", **meta)).tokens("val").tolist() == [
        70_000,
        1,
    ]


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "train.bin").unlink(), "train.bin not found"),
        (lambda f: (f / "train.bin").write_bytes(b""), "train.bin has 0 bytes"),
        (
            lambda f: (f / "train.bin").write_bytes(b"\0" * 7),
            "train.bin has 7 bytes, not a whole number",
        ),
        (
            lambda f: (f / "train.bin").write_bytes(b"\xff\xff"),
            "id 65535, but the vocabulary ends at 255",
        ),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json is damaged"),
        (lambda f: (f / "meta.json").write_text("{}"), "meta.json must give encoding"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json must give encoding"),
        (lambda f: (f / "recall.jsonl").write_text('{"prompt": 1}\n'), "recall.jsonl, line 1"),
    ],
)
def test_a_broken_folder_is_refused_by_file(tmp_path, damage, message):
    tokens = [chr(i) for i in range(256)]
    vocabulary = {"name": "b", "pattern": r"[\s\S]", "tokens": tokens, "special_tokens": {}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    folder = folder_of(
        tmp_path, encoding="vocab.json", dtype="uint16", vocab_size=256, separator=10
    )
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        dataset = Dataset(folder)
        dataset.tokens("train"), dataset.questions()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "file") as f:
        f.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == [
        "file"
    ]


# --- batches ----------------------------------------------------------------------------------------------


def test_an_epoch_shows_each_token_once():
    ids, T = np.arange(1000, dtype=np.uint16), 16
    batches = Batches(ids, T, 3, 1000)
    windows = (1000 - T - 1) // T
    for epoch in range(3):
        got = batches.windows(range(epoch * windows, (epoch + 1) * windows))
        assert got.shape == (windows, T + 1) and (np.diff(got) == 1).all() and got.dtype == np.int64
        seen = np.sort(got[:, :-1].flatten())
        once = np.arange(seen[0], seen[0] + windows * T)
        assert np.array_equal(seen, once) and seen[0] < T  # each once, without a gap


def test_batches_depend_on_seed_and_number_only():
    ids = np.arange(5000, dtype=np.uint16)
    a, b = Batches(ids, 16, 3, 5000), Batches(ids, 16, 3, 5000)
    b.windows(range(900, 905))  # asked for something else before, from another epoch
    for numbers in ([0, 1], [700, 2], [309, 310, 311]):
        assert np.array_equal(a.windows(numbers), b.windows(numbers))
    one_by_one = np.concatenate([Batches(ids, 16, 3, 5000).windows([n]) for n in range(8)])
    assert np.array_equal(one_by_one, a.windows(range(8)))
    assert not np.array_equal(a.windows(range(8)), Batches(ids, 16, 4, 5000).windows(range(8)))
    first_epoch, second_epoch = a.windows(range(311)), a.windows(range(311, 622))
    assert not np.array_equal(first_epoch, second_epoch)


def test_a_token_id_past_the_vocabulary_is_found_wherever_it_is(tmp_path):
    ids = np.full(2**24 + 400, 999, dtype="<u2")
    ids[-100:] = 50257  # behind what is looked at when the folder is opened
    tokens = Dataset(folder_of(tmp_path, ids)).tokens("train")
    batches = Batches(tokens, 64, 0, 50257)
    last = next(n for n in range(2**24 // 64) if batches.start(n) > len(ids) - 200)
    with pytest.raises(
        ValueError, match=r"train.bin has token id 50257, but the vocabulary ends at 50256"
    ):
        batches.windows([last])
    batches.windows([last + 1])


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="32 tokens are too few for block_size=16: 33 are needed"):
        Batches(np.zeros(32, dtype=np.uint16), 16, 0, 10)
