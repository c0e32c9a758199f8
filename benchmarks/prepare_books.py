"""Turn the books of the development data into tokens for `fp8_quality.py`: a byte-level BPE of the training books, and both splits in it.

    python benchmarks/prepare_books.py ../shared/data/text FOLDER [--vocabulary 32768]

Reads books_train.jsonl.xz and books_val.jsonl.xz (one book a line, `text`); writes tokenizer.json, train.xz, val.xz and about.json.  The
result is the books in another form: like them it is not to be redistributed, nor committed.  The same books give the same
files.  Needs the `tokenizers` package.
"""

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_BOOK = "<|end|>"
MAX_BYTES = 45_000_000
"""Largest size of both splits together: small enough to be carried to a GPU machine."""

PIECE_CHARACTERS = 200_000
"""About how much text is encoded at a time; books are cut between paragraphs."""


def books(path: Path) -> Iterator[str]:
    """Yield the text of each book."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def pieces(text: str) -> Iterator[str]:
    """Cut a book between paragraphs; the pieces joined are the book."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + PIECE_CHARACTERS)
        stop = len(text) if cut < 0 else cut + 2
        yield text[start:stop]
        start = stop


def train_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """Learn a byte-level BPE, so that every text can be written in it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_BOOK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in books(path) for piece in pieces(text)), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, path: Path) -> tuple[NDArray[np.uint16], int]:
    """Return the tokens of all books, each after an end-of-book token, and how many bytes of text they are."""
    end = tokenizer.token_to_id(END_OF_BOOK)
    parts: list[NDArray[np.uint16]] = []
    n_bytes = 0
    for text in books(path):
        parts.append(np.array([end], dtype=np.uint16))
        n_bytes += len(text.encode())
        parts.extend(np.array(own.ids, dtype=np.uint16) for own in tokenizer.encode_batch_fast(list(pieces(text))))
    return np.concatenate(parts), n_bytes


def save(tokens: NDArray[np.uint16], path: Path) -> int:
    """Write tokens as xz over all low bytes, then all high bytes; returns the size of the file."""
    planes = tokens.astype("<u2").view(np.uint8).reshape(-1, 2).T
    path.write_bytes(lzma.compress(planes.tobytes(), preset=6))
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of books_train.jsonl.xz and books_val.jsonl.xz")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--vocabulary", type=int, default=32768, help="tokens, at most 65536")
    options = parser.parse_args()
    if not 512 <= options.vocabulary <= 1 << 16:
        parser.error("--vocabulary must be between 512 and 65536")
    options.target.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    tokenizer = train_tokenizer(options.source / "books_train.jsonl.xz", options.vocabulary)
    tokenizer.save(str(options.target / "tokenizer.json"))
    print(f"tokenizer of {tokenizer.get_vocab_size()} tokens after {time.perf_counter() - started:.0f} s")
    about: dict[str, float] = {"vocabulary": tokenizer.get_vocab_size()}
    size = 0
    for split in ("train", "val"):
        tokens, n_bytes = encode(tokenizer, options.source / f"books_{split}.jsonl.xz")
        size += save(tokens, options.target / f"{split}.xz")
        about |= {f"{split}_tokens": len(tokens), f"{split}_bytes": n_bytes}
        print(f"{split}: {len(tokens):,} tokens an epoch, {n_bytes / len(tokens):.3f} bytes a token")
    (options.target / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{size / 1e6:.1f} MB for both, {time.perf_counter() - started:.0f} s")
    if size > MAX_BYTES:
        parser.exit(1, f"{size:,} bytes are more than {MAX_BYTES:,}: choose a smaller --vocabulary\n")


if __name__ == "__main__":
    main()
