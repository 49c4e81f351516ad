"""Prompts are joined part by part, and are the released ones to the byte."""

import json
import zipfile

import gemma_like
import pytest
from sentencepiece import sentencepiece_model_pb2

from genrm_jax.runtime.errors import UserError
from genrm_jax.tasks.gsm8k.rows import BadRows, iter_critiques, iter_direct
from genrm_jax.text.prompts import FORMATS, Prompter, PromptFormat, make_format
from genrm_jax.text.tokenizer import TURN_MARKERS, CharTokenizer, SentencePieceTokenizer, train_sentencepiece

CHAR = CharTokenizer()
CHAT = make_format("genrm_chat")
WITHOUT_TURNS = [f for f in FORMATS.values() if not f.end]
LINES = [
  f"Q: Ann has {n} cards, 4.{n} and 5. The answer is {n}.\nA: Let's think step by step. {n}\n" for n in range(40)
]
QUESTION, SOLUTION = "Ann has 7 cards.", "7 = 3 + 4.\nThe answer is 7"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  return train_sentencepiece(LINES, tmp_path_factory.mktemp("sp") / "tiny.model", vocab_size=320)


@pytest.fixture(scope="module", params=[2, 3], ids=["gemma2", "gemma3"])
def gemma(request, tmp_path_factory):
  return gemma_like.write(tmp_path_factory.mktemp("gemma") / "gemma.model", request.param)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("which", ["char", "trained", "gemma"])
def test_parts_are_encoded_apart_and_joined(name, which, trained, gemma):
  tokenizer, form = {"char": CHAR, "trained": trained, "gemma": gemma}[which], FORMATS[name]
  if form.end and which != "gemma":
    with pytest.raises(UserError, match="must be one token"):
      Prompter(tokenizer, form)
    return
  (end,) = encode_end = tokenizer.encode(form.end) or [tokenizer.eos_id]
  prompter, encode = Prompter(tokenizer, form), tokenizer.encode
  solve = [tokenizer.bos_id, *encode(form.solve.replace("{question}", QUESTION))]
  assert prompter.solve(QUESTION) == solve
  assert prompter.solution(SOLUTION) == [*encode(SOLUTION), *encode_end]
  assert prompter.direct(QUESTION, SOLUTION) == [*solve, *encode(SOLUTION), *encode(form.verify)]
  assert prompter.cot(QUESTION, SOLUTION) == [*solve, *encode(SOLUTION), *encode(form.verify_cot)]
  for correct, text in ((True, " Yes"), (False, " No")):
    (verdict,) = encode(text)
    written = [*encode("3 + 4 = 7."), *encode(form.verdict_question), verdict, end]
    assert prompter.rationale("3 + 4 = 7.", correct) == written
    assert prompter.verdict_id(correct) == verdict
  assert prompter.end_id == end
  assert (prompter.yes_id, prompter.no_id) == (prompter.verdict_id(True), prompter.verdict_id(False))


def test_no_token_straddles_two_parts(trained):
  encode = trained.encode
  # "step by step" has pieces of its own where it stands together.
  assert encode("ste") + encode("p by") != encode("step by")
  form = PromptFormat("cut", solve="{question}p by", verify="p by", verify_cot="p by", verdict_question="p by")
  prompter = Prompter(trained, form)
  pieces = [*encode("ste"), *encode("p by")]
  assert prompter.direct("q", "ste")[-len(pieces) :] == pieces == prompter.cot("q", "ste")[-len(pieces) :]
  assert prompter.rationale("ste", True)[:-2] == pieces
  # The question is part of its template: both are given, and read as one text.
  assert prompter.solve("ste") == [trained.bos_id, *encode("step by")]


def test_each_prompt_begins_as_the_one_for_a_solution():
  for form in WITHOUT_TURNS:
    prompter = Prompter(CHAR, form)
    solve = prompter.solve(QUESTION)
    for prompt in (prompter.direct(QUESTION, SOLUTION), prompter.cot(QUESTION, SOLUTION)):
      assert prompt[: len(solve)] == solve
      assert CHAR.decode(prompt[len(solve) :]).startswith(SOLUTION)


def test_formats_are_told_apart_by_their_last_texts():
  for form in FORMATS.values():
    assert form.solve.count("{question}") == 1
    assert form.verify != form.verify_cot
    # The rationale's question is the direct one, so that one verdict is learnt and not two.
    assert form.verify.endswith(form.verdict_question.strip())
    assert not (form.verify + form.verdict_question).endswith((" ", "\n"))


@pytest.mark.parametrize("question", ["{question}", "{}", "{0} and {x!r:>{y}}", "}{", "a \\1 %s {{question}}"])
def test_braces_in_a_question_stay_as_they_are(question, gemma):
  for form in FORMATS.values():
    before, after = form.solve.split("{question}")
    written = before + question + after + "{question}" + form.verify
    for marker in TURN_MARKERS:
      written = written.replace(marker, "")
    assert gemma.decode(Prompter(gemma, form).direct(question, "{question}")) == written


@pytest.mark.parametrize(
  ("yes", "no", "message"),
  [
    (" yes", " No", r"the verdict ' yes' must be one token, but tokenizer char gives ids \[\d+, \d+, \d+, \d+\]"),
    (" Yes", "No", r"the verdict 'No' must be one token, but tokenizer char gives ids \[\d+, \d+\]"),
    (" Yes", "", r"the verdict '' must be one token, but tokenizer char gives ids \[\]"),
    (" Yes", " Yes", r"tokenizer char maps both verdicts to id \d+"),
  ],
)
def test_verdicts_must_be_one_token_each(yes, no, message):
  form = make_format("compact")
  with pytest.raises(UserError, match=message):
    Prompter(CHAR, PromptFormat("x", form.solve, form.verify, form.verify_cot, form.verdict_question, yes, no))


def test_unknown_format():
  with pytest.raises(
    UserError, match="unknown prompt format 'gsm8k'; there are: genrm, genrm_short, genrm_chat, compact"
  ):
    make_format("gsm8k")


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda f: f.name)
def test_a_verdict_that_melts_into_its_question(form, gemma, tmp_path):
  Prompter(gemma, form)
  path = tmp_path / "melts.model"
  model = sentencepiece_model_pb2.ModelProto.FromString(gemma.file_bytes)
  for piece in (")?▁No", "?▁No"):
    model.pieces.add(piece=piece, score=-1000.0)
  path.write_bytes(model.SerializeToString())
  melts = SentencePieceTokenizer(path)
  (no,) = melts.encode(" No")  # alone it is one piece still
  with pytest.raises(UserError) as error:
    Prompter(melts, form)
  assert f"{path} does not keep the verdict ' No' apart" in str(error.value)
  for ids in ([*melts.encode(form.verify), no], melts.encode(form.verify + " No")):
    assert str(ids) in str(error.value)


# --- chats


def test_turns_of_a_chat(gemma):
  prompter = Prompter(gemma, CHAT)
  start, end = (gemma.encode(marker)[0] for marker in TURN_MARKERS)

  def turns(ids):
    assert ids[0] == gemma.bos_id and gemma.bos_id not in ids[1:]
    return [i for i in ids if i in (start, end)]

  assert turns(prompter.solve(QUESTION)) == [start, end, start]
  for prompt in (prompter.direct(QUESTION, SOLUTION), prompter.cot(QUESTION, SOLUTION)):
    assert turns(prompt) == [start, end, start, end, start, end, start]
    # The solution that is verified is the one that was to be written, closed by the same mark.
    written = [*prompter.solve(QUESTION), *prompter.solution(SOLUTION)]
    assert prompt[: len(written)] == written
  newline, user, model = (gemma.encode(text) for text in ("\n", "user\n", "model\n"))
  solve = prompter.solve(QUESTION)
  assert solve[: 2 + len(user)] == [gemma.bos_id, start, *user]
  assert solve[-len(model) - 3 :] == [end, *newline, start, *model]
  assert prompter.cot(QUESTION, SOLUTION)[-len(model) - 1 :] == [start, *model]
  asked = gemma.encode(CHAT.verdict_question.strip())
  assert prompter.direct(QUESTION, SOLUTION)[-len(model) - len(asked) :] == [*model, *asked]
  assert prompter.rationale("1 = 1", True)[-len(asked) - 2 :] == [*asked, prompter.yes_id, end]
  assert end == prompter.end_id != gemma.eos_id


def test_a_chat_needs_its_markers(trained, gemma, tmp_path):
  with pytest.raises(UserError, match=r"'<start_of_turn>' of prompt format 'genrm_chat' .* tokenizer char gives ids"):
    Prompter(CHAR, CHAT)
  with pytest.raises(UserError, match=r"'<start_of_turn>' .*/tiny\.model gives ids"):
    Prompter(trained, CHAT)
  path = tmp_path / "renamed.model"
  path.write_bytes(gemma.file_bytes.replace(b"<end_of_turn>", b"<fin_of_turn>"))
  with pytest.raises(UserError, match=r"'<end_of_turn>' .*/renamed\.model gives ids"):
    Prompter(SentencePieceTokenizer(path), CHAT)


# --- the released data


def _released(data_dir, kind):
  """Raw rows of the validation set, in the order in which the readers give them."""
  folder = data_dir / "genrm-critiques" / "critiques"
  for label in ("correct", "incorrect"):
    for path in sorted(folder.glob(f"{kind}_{label}_solutions_batch_*_val.zip")):
      with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".jsonl") and not n.startswith("__MACOSX"))
        yield from map(json.loads, archive.read(name).decode().splitlines())


def test_direct_prompts_are_the_released_ones(data_dir, trained):
  prompter = Prompter(trained, make_format("genrm"))
  raw = list(_released(data_dir, "rm"))
  parsed = list(iter_direct(data_dir, "val", BadRows()))
  assert len(raw) == len(parsed) == 212
  for row, (question, solution, correct, _) in zip(raw, parsed, strict=True):
    assert trained.decode(prompter.direct(question, solution)) == row["inputs"]
    assert trained.decode([prompter.verdict_id(correct)]) == row["targets"]


def test_rationale_prompts_are_the_released_ones(data_dir, trained):
  prompter = Prompter(trained, make_format("genrm"))
  raw = list(_released(data_dir, "critiques"))
  parsed = list(iter_critiques(data_dir, "val", BadRows()))
  assert len(raw) == len(parsed) == 259
  rebuilt = 0
  for row, (question, solution, _, correct, _) in zip(raw, parsed, strict=True):
    assert trained.decode(prompter.cot(question, solution)) == row["inputs"]
    verdict = trained.decode([prompter.verdict_id(correct)])
    assert row["targets"].endswith(prompter.format.verdict_question.strip() + verdict)
    # Most pose the question after an empty line, as we do; the others after a heading of their own.
    rationale, asked, end = row["targets"].rpartition(prompter.format.verdict_question)
    if asked and end == verdict:
      rebuilt += 1
      assert trained.decode(prompter.rationale(rationale, correct)) == row["targets"]
  assert rebuilt == 227
