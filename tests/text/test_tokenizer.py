"""decode(encode(x)) == x, joined ids decode to joined texts, and each verdict is one id in any context."""

import contextlib
import json
import string

import gemma_like
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.runtime.errors import UserError
from genrm_jax.text.tokenizer import (
  TURN_MARKERS,
  CharTokenizer,
  SentencePieceTokenizer,
  check_vocab,
  load_tokenizer,
  max_padding_rows,
  train_sentencepiece,
)

CHAR = CharTokenizer()
ASCII = string.printable[:95] + "\n"
CHAR_TEXT = st.lists(st.sampled_from([*ASCII, " Yes", " No", " Ye"])).map("".join)
# Every code point that UTF-8 can hold, and the ones that SentencePiece treats in its own way.
TEXT = st.lists(
  st.characters(exclude_categories=["Cs"])
  | st.sampled_from(["▁", "▅", " ", "  ", "\n", "\r\n", "\0", "\t", " Yes", "Yes", " No", "½", " " * 40, "\n\n\n"])
  | st.sampled_from(["<cls>", "</s>", "<0x41>", "<mask>", "<unused1>", "<table>", "< end_of_turn>", "<END_OF_TURN>"]),
  max_size=20,
).map("".join)
CONTROLS = (*TURN_MARKERS, "<bos>", "<eos>", "<pad>", "<unk>", "<cls>", "<unused0>", "<unused98>", "<mask>", "<st")


def _check_round_trip(tokenizer, texts, spelled=CONTROLS):
  specials = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.cls_id}
  assert len(specials) == 4
  controls = specials.union(*(ids for ids in map(tokenizer.encode, spelled) if len(ids) == 1))

  @settings(max_examples=200, deadline=None)
  @given(texts, texts, st.lists(texts | st.sampled_from(["", *spelled]), max_size=6).map("".join))
  def check(a, b, c):
    ids, plain = tokenizer.encode(a), tokenizer.encode_plain(c)
    assert tokenizer.decode(ids) == a
    assert tokenizer.decode(ids + tokenizer.encode(b)) == a + b
    assert not specials.intersection(ids) and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(plain) == c and controls.isdisjoint(plain)
    assert tokenizer.controls.search(c) or plain == tokenizer.encode(c)

  check()
  assert tokenizer.decode([*specials, *tokenizer.encode("a"), *specials]) == "a"


def _check_verdicts(tokenizer, contexts):
  (yes,), (no,) = tokenizer.encode(" Yes"), tokenizer.encode(" No")
  assert yes != no and yes not in tokenizer.encode("Yes")
  for before in contexts:
    assert tokenizer.encode(before + " Yes")[-1] == yes and tokenizer.encode(before + " No")[-1] == no


def test_round_trip_and_verdicts(tokenizer):
  _check_round_trip(tokenizer, CHAR_TEXT if tokenizer.name == "char" else TEXT)
  _check_verdicts(tokenizer, ("", "a", "correct (Yes/No)?", "?\n", " Yes"))
  # An embedding may have a few more rows than there are pieces.
  most = max_padding_rows(tokenizer.vocab_size)
  for extra in (0, 64, most):
    check_vocab(tokenizer, tokenizer.vocab_size + extra)
    spare = range(tokenizer.vocab_size, tokenizer.vocab_size + extra)
    assert tokenizer.decode([*spare, *tokenizer.encode("a"), *spare]) == "a"
  size = tokenizer.vocab_size
  for rows in (size - 1, size + most + 1, size + 10**6):
    refused((f"{size} pieces.* {rows} rows", check_vocab, tokenizer, rows))
  for ids in ([size + most], [-1], [4, 10**9]):
    refused((f"id {ids[-1]} is outside the {size} ids", tokenizer.decode, ids))


def test_ids_of_characters_and_of_a_trained_file(trained):
  assert sorted(CHAR.encode(ASCII)) == list(range(6, 102)) and CHAR.vocab_size == 102
  refused((r"'é' \(U\+00E9\), at character 4 ", CHAR.encode, " Yesé b"), ("surrogate", trained.encode, "a\ud800"))
  _check_verdicts(trained, ("? ", "\n", "漢", "▁"))
  assert [trained.pad_id, trained.eos_id, trained.bos_id, trained.cls_id] == [0, 1, 2, 4]
  assert len(trained.encode("\n")) == 1 and len(trained.encode("\n\n")) == 2
  assert trained.encode("1234") == [i for digit in "1234" for i in trained.encode(digit)]
  assert trained.decode(trained.encode("a<end_of_turn>")) == "a<end_of_turn>"  # this file has no turns


def test_training_is_deterministic(trained, tmp_path):
  texts = gemma_like.TEXTS
  again = train_sentencepiece(iter(texts), tmp_path / "other" / "name.model", vocab_size=500)
  assert again.digest == trained.digest
  assert [p.name for p in (tmp_path / "other").iterdir()] == ["name.model"]
  few = [train_sentencepiece(texts, tmp_path / "few.model", 400, seed, max_lines=100).digest for seed in (0, 0, 1)]
  assert few[0] == few[1] != few[2]
  long = train_sentencepiece([" ".join(texts).replace("\n", " ")], tmp_path / "long.model", 500)
  assert len(long.encode(" apples")) == 1, "long lines are learnt from"
  refused(("could not be written", train_sentencepiece, texts, tmp_path / "few.model" / "x.model", 500))


def test_training_errors(tmp_path, capfd):
  for texts, vocab_size, message in (
    *(([], 400, "no text"), (["\n\n"], 400, "no text"), (["a\ud800"], 400, "surrogate")),
    *(([text], 4000, r"4000 is too large .*at most \d+") for text in ("hello world", " ")),
    *((gemma_like.TEXTS, size, f"{size} is too small") for size in (280, 263, -5)),
  ):
    refused((message, train_sentencepiece, texts, tmp_path / "x.model", vocab_size))
  assert list(tmp_path.iterdir()) == [] and capfd.readouterr().err == ""


@pytest.mark.parametrize("family", [2, 3])
def test_gemma_ids(family, make_tokenizer):
  gemma = make_tokenizer(f"gemma{family}")
  assert (gemma.pad_id, gemma.eos_id, gemma.bos_id) == (0, 1, 2)
  first_unused, start, end, newline = {2: (7, 106, 107, 108), 3: (6, 105, 106, 107)}[family]
  assert gemma.cls_id == first_unused == gemma.encode("<unused0>")[0]
  assert gemma.encode("<start_of_turn>a<end_of_turn>\n") == [start, *gemma.encode("a"), end, newline]
  assert gemma.encode("\n" * 31) == [newline + 30] and gemma.encode(" " * 2) == [newline + 31]
  assert gemma.encode("<mask>") == [4] and len(gemma.encode("<bos>")) > 1
  assert [gemma.decode([i]) for i in gemma.encode("123")] == ["1", "2", "3"]
  for marker in TURN_MARKERS:
    assert gemma.decode(gemma.encode(f" a{marker}▁b")) == " a▁b", "a marker decodes to nothing"


def test_a_released_file_with_its_own_normalisation(data_dir):
  path = data_dir / "sentencepiece" / "cc_all.32000.100extra.model"
  if not path.exists():
    pytest.skip(f"no {path}")
  foreign = SentencePieceTokenizer(path)
  assert (foreign.pad_id, foreign.eos_id, foreign.bos_id, foreign.vocab_size) == (0, 1, 2, 32101)
  assert foreign.cls_id == 32100  # its <extra_id_0>
  _check_verdicts(foreign, ("", "Is it correct (Yes/No)?"))
  # Its normalisation (nmt_nfkc) leaves printable ASCII alone; "~" and a few others it does not know at all.
  known = [c for c in ASCII[:95] if foreign._processor.unk_id() not in foreign.encode(c)]
  assert len(known) > 85
  _check_round_trip(foreign, st.text(st.sampled_from(known)), ())
  assert foreign.encode(" <extra_id_5>") == [32095] and 32095 not in foreign.encode_plain(" <extra_id_5>")
  # The losses of the file itself.
  assert [foreign.decode(foreign.encode(x)) for x in ("a\nb\tc", "a▁b", "☃")] == ["a b c", "a b", " ⁇ "]


def test_damaged_files(trained, tmp_path):
  path = tmp_path / "x.model"
  refused(
    (r"x\.model: no such tokenizer file", SentencePieceTokenizer, path),
    *(("could not be read", SentencePieceTokenizer, place) for place in (tmp_path, f"{tmp_path}/\0")),
  )
  half = trained.file_bytes[: len(trained.file_bytes) // 2]
  for content in (b"", b"garbage", half, b'{"a": 1}', b"\0" * 100):
    path.write_bytes(content)
    refused((r"x\.model: (not a SentencePiece model|no piece|the file has no)", SentencePieceTokenizer, path))
  for at in range(0, len(trained.file_bytes), 97):  # one flipped bit: opened, or one message
    flipped = bytearray(trained.file_bytes)
    flipped[at] ^= 1 << at % 8
    path.write_bytes(flipped)
    with contextlib.suppress(UserError):
      SentencePieceTokenizer(path)
  remedy = "use the tokenizer file that came with the model, or .*`train_sentencepiece`"
  for piece, message in (
    ("<cls>", "none of <cls>.*; "),
    ("<s>", "no bos piece, .* called '<s>'; set its bos_piece .*, "),
    ("</s>", "no eos piece, .* called '</s>'; set its eos_piece .*, "),
    ("<pad>", ""),
  ):
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.file_bytes)
    for spec in (p for p in model.pieces if p.piece == piece):
      spec.piece = "<other>"
    path.write_bytes(model.SerializeToString())
    if message:
      refused((message + remedy, SentencePieceTokenizer, path))
  assert SentencePieceTokenizer(path).pad_id == 3, "without pad, unk is the padding"


def test_a_tokenizer_is_loaded_again_from_its_description(trained, tmp_path):
  for tokenizer in (CHAR, trained):
    again = load_tokenizer(json.loads(json.dumps(tokenizer.spec())))
    assert (again.digest, again.name, again.spec()) == (tokenizer.digest, tokenizer.name, tokenizer.spec())
  spec = trained.spec()
  for name in ("trained.model", "copy.model"):
    (tmp_path / name).write_bytes(trained.file_bytes)
  for path, folder, found in (
    (spec["path"], tmp_path, str(tmp_path / "trained.model")),  # a copy in the folder comes first
    (spec["path"], tmp_path / "no such folder", spec["path"]),
    ("copy.model", tmp_path, str(tmp_path / "copy.model")),
  ):
    again = load_tokenizer(spec | {"path": path}, folder)
    assert (again.digest, again.spec()["path"]) == (trained.digest, found)
  refused(
    ("000000000000 was expected", load_tokenizer, {"type": "char", "digest": "0" * 64}),
    *((f"type {kind!r} is unknown", load_tokenizer, {"type": kind, "digest": ""}) for kind in ("bpe", None)),
    ("no tokenizer file at /no", load_tokenizer, {"type": "sentencepiece", "path": "/no/such.model", "digest": ""}),
  )
