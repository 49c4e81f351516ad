"""A verifier leaves with all that scores elsewhere, as here; docs/checkpoints.md runs; imports stay light."""

import json
import pathlib
import re
import subprocess
import sys

import gemma_like
import jax
import numpy as np
import pytest
import saved_runs
from refusals import refused

import genrm_jax
from genrm_jax.checkpoints import pretrained
from genrm_jax.export import export
from genrm_jax.runtime import sharding
from genrm_jax.text.tokenizer import TURN_MARKERS, SentencePieceTokenizer

PAIR = ("7 apples and 9 pears", "12 pears? No\n3")
# What spells turn markers and other special pieces is text.
SPELLED = ("7<end_of_turn> [3] <b>9</b> <unused0>", "<start_of_turn>model\n<bos>1 <cls><end_of_turn><eos>")


def _mesh():
  return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  out = {}
  for name, task, changes in (
    ("genrm", "gsm8k", {"verifiers__genrm__lora__rank": 2}),
    ("orm", "last_letter", {}),
    ("dpo", "last_letter", {}),
    ("genrm_cot", "gsm8k", {"votes__sample__temperature": 0.0}),
  ):
    run = saved_runs.run_of(folder / name, task, **{f"verifiers__{name}__init_from": ""}, **changes)
    if name == "genrm":  # Gemma's control pieces
      run.workdir.mkdir(parents=True)
      gemma_like.write(run.path("tokenizer.model"), family=3)
    out[name] = saved_runs.save(run, name, scale=3.0 if name == "genrm_cot" else 1.0)
  return out


@pytest.fixture(scope="module")
def exported(runs, tmp_path_factory):
  folder = tmp_path_factory.mktemp("exported")
  for name, path in runs.items():
    export(path, folder / name)
  return folder


@pytest.mark.parametrize("name", ["genrm", "orm", "dpo", "genrm_cot"])
def test_what_goes_out_comes_back_bit_for_bit(name, runs, exported, tmp_path):
  params, manifest = genrm_jax.load_params(runs[name])
  card = (exported / name / "README.md").read_text()
  said = json.loads(re.search(r"```json\n(.*?)\n```", card, re.DOTALL)[1])
  prompter = genrm_jax.load(runs[name], mesh=_mesh()).verifier.prompter
  assert (said["ids"]["yes"], said["templates"]["yes"]) == (prompter.yes_id, " Yes")
  assert said["scoring"] == manifest["scoring"]
  export(runs[name], tmp_path / "released", "released")
  places = {"hugging_face": exported / name, "released": tmp_path / "released" / "checkpoint"}
  for layout, place in places.items():
    given = None
    if layout == "released":  # its files do not say all of a model
      given = pretrained.open_checkpoint(exported / name).config
    got, config = pretrained.load(place, _mesh(), config=given)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(got))
    theirs, ours = config.to_dict(), manifest["model"]
    assert {f: theirs[f] for f in ours if f != "name"} == {f: ours[f] for f in ours if f != "name"}
  if name not in ("orm", "dpo"):
    digest = manifest["tokenizer"]["digest"]
    for place in (exported / name, tmp_path / "released"):
      assert SentencePieceTokenizer(place / "tokenizer.model").digest == digest


@pytest.mark.parametrize("name", ["genrm", "orm", "dpo", "genrm_cot"])
def test_transformers_gives_the_same_score_by_the_cards_own_lines(name, runs, exported, monkeypatch):
  pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  monkeypatch.chdir(exported / name)
  code = re.search(r"```python\n(.*?)\n```", (exported / name / "README.md").read_text(), re.DOTALL)[1]
  theirs: dict = {}
  exec(code, theirs)
  verifier = genrm_jax.load(runs[name], mesh=_mesh())
  prompter = verifier.verifier.prompter
  ids = verifier.verifier.prompt(*PAIR)
  assert theirs["prompt"](PAIR[0], "" if name == "dpo" else PAIR[1]) == ids
  if name == "genrm":
    assert theirs["prompt"](*SPELLED) == verifier.verifier.prompt(*SPELLED)
    assert [len(prompter.tokenizer.encode(marker)) for marker in TURN_MARKERS] == [1, 1]
  if name != "genrm_cot":
    assert theirs["score"](*PAIR) == pytest.approx(verifier.score(*PAIR), rel=1e-4, abs=0)  # a likelihood is tiny
    return
  # Greedy: the same rationale, token by token. Then the verdict is read where it was asked for, if it was.
  out = theirs["model"].generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
  assert prompter.tokenizer.decode(out) == verifier.rationales(*PAIR)[0].text
  said = prompter.tokenizer.encode(prompter.format.verdict_question)
  logits = torch.zeros(2, verifier.engine.config.vocab_size)
  logits[0, prompter.yes_id], logits[1, prompter.yes_id] = 1.0, 3.0

  def generate(start, **_):
    rows = torch.tensor([[*said, prompter.yes_id], [*said[1:], *said[:1], prompter.no_id]])
    steps = tuple(logits for _ in range(rows.shape[1]))
    return type("Out", (), {"sequences": torch.cat([start, rows], 1), "logits": steps})

  monkeypatch.setattr(theirs["model"], "generate", generate)
  want = float(torch.softmax(logits[0], -1)[prompter.yes_id])
  assert theirs["score"](*PAIR) == pytest.approx(want), "the second row never asks, so it has no vote"


def test_the_command_writes_a_folder_and_nothing_is_written_over_one(runs, tmp_path):
  out, command = tmp_path / "out", [sys.executable, "-m", "genrm_jax.export", f"--checkpoint={runs['orm']}"]
  refused(
    ("no checkpoint at", export, tmp_path / "none", out),
    ("unknown layout 'gguf'; there are: hugging_face, released", export, runs["orm"], out, "gguf"),
  )
  assert not out.exists()
  done = subprocess.run([*command, f"--to={out}"], capture_output=True, text=True)
  assert done.returncode == 0 and "written" in done.stderr, done.stderr
  before = sorted(p.name for p in out.iterdir())
  assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(before)
  assert not {"NOTICE"} & set(before), "made from scratch"
  refused((f"{out} is there and not empty", export, runs["orm"], out))
  assert sorted(p.name for p in out.iterdir()) == before


def test_what_is_made_from_a_gemma_carries_its_notice(tmp_path):
  small = {"num_layers": 1, "embed_dim": 8, "ffw_dim": 8}
  changes = {f"model__overrides__{field}": size for field, size in small.items()}
  run = saved_runs.run_of(tmp_path / "run", "gsm8k", verifiers__orm__init_from="", model__size="gemma3_270m", **changes)
  export(saved_runs.save(run, "orm"), tmp_path / "out", "released")
  for name in ("NOTICE", "README.md"):
    assert "subject to the Gemma Terms of Use" in (tmp_path / "out" / name).read_text()


HEAVY = ("tensorflow", "torch", "transformers", "tensorflow_datasets", "gemma")
MODULES = ("genrm_jax", "genrm_jax.verifiers", "experiments.gsm8k", "experiments.studies.reproduce")
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_checkpoints_page(tmp_path, monkeypatch, capsys):
  run = saved_runs.run_of(tmp_path / "runs" / "last_letter")
  export(saved_runs.save(run, "genrm_cot"), tmp_path / "gemma")
  monkeypatch.chdir(tmp_path)
  names: dict = {}
  for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
    exec(block, names)
  assert len(names["scores"]) == 2 and names["params"]["layers"]["q"].dtype == "bfloat16"
  assert (tmp_path / "exported" / "README.md").exists()
  assert "genrm_cot 4" in capsys.readouterr().out


def test_imports_stay_light():
  code = f"import sys, {', '.join(MODULES)}; print([name for name in {HEAVY!r} if name in sys.modules])"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.split("\n")[-2] == "[]"
