"""A run is opened with its path alone, on any devices; one starts from a Gemma checkpoint, with adapters too."""

import json
import pathlib
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import recorded_config
import saved_runs
from etils import epath
from refusals import refused

import genrm_jax
from genrm_jax.data import jsonl
from genrm_jax.export import export
from genrm_jax.model import lora
from genrm_jax.pipeline import checks, fitting
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.experiment import _notes, make_stages
from genrm_jax.pipeline.run import Run
from genrm_jax.records import Score
from genrm_jax.runtime import memory, sharding
from genrm_jax.text.tokenizer import SentencePieceTokenizer
from genrm_jax.training import saved

PAIRS = [("mike dan", "ee+n"), ("mike dan", "en"), ("a bc def", "xyz" * 9)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  (folder / "moved").mkdir()
  out = {}
  for task, name in (("last_letter", "genrm"), ("gsm8k", "genrm_cot")):
    run = saved_runs.run_of(folder / name, task, **{f"verifiers__{name}__init_from": ""})
    path = saved_runs.save(run, name)
    shutil.move(path / "4", folder / "moved" / name)
    shutil.rmtree(run.workdir)
    out[name] = folder / "moved" / name
  return out


def _is_of(score, candidate):
  return (score.problem_id, score.candidate_index) == (candidate.problem_id, candidate.index)


def _one_device():
  return sharding.make_mesh(devices=jax.devices()[:1])


def test_a_score_by_votes_is_their_mean_and_depends_on_its_texts_alone(runs):
  verifier = genrm_jax.load(runs["genrm_cot"], mesh=_one_device())
  assert (verifier.how.num_votes, verifier.how.sample.max_new_tokens) == (2, 8) and verifier.step == 4
  scores = verifier.score_many(PAIRS)
  assert scores == verifier.score_many(PAIRS[::-1])[::-1], "not on the order"
  votes = verifier.rationales(*PAIRS[1])
  assert [v.num_tokens <= 8 and v.text != "" for v in votes] == [True, True]
  assert np.mean([v.p_yes for v in votes]) == pytest.approx(verifier.score(*PAIRS[1]), rel=1e-6)
  assert verifier.score(*PAIRS[1]) == pytest.approx(scores[1], rel=1e-5), "not on neighbours"
  more = verifier.rationales(*PAIRS[1], num_votes=3)
  assert [v.text for v in more[:2]] == [v.text for v in votes] and more[2].text != more[1].text
  assert [v.text for v in verifier.rationales(*PAIRS[1], seed=1)] != [v.text for v in votes]
  refused(("num_votes must be 1 or more, not 0", partial(verifier.score, *PAIRS[0], num_votes=0)))


def test_the_command_scores(runs):
  code = ["-c", "from genrm_jax.pipeline.cli import console; console()", "score", f"--checkpoint={runs['genrm_cot']}"]
  question, solution = PAIRS[0]
  done, wrong = (
    subprocess.run([sys.executable, *code, *arguments], capture_output=True, text=True)
    for arguments in ([question, solution, "--num_votes=3", "--rationales"], [question])
  )
  assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (1, "", 1), wrong.stderr
  score, *votes = done.stdout.splitlines()
  verifier = genrm_jax.load(runs["genrm_cot"])
  want = verifier.rationales(question, solution, num_votes=3)
  assert [json.loads(vote)["text"] for vote in votes] == [vote.text for vote in want]
  assert float(score) == pytest.approx(verifier.score(question, solution, num_votes=3), abs=1e-6)


def test_any_devices_and_bfloat16_by_choice_and_memory_is_asked_for_first(runs, monkeypatch):
  path = runs["genrm"]
  exact, coarse = genrm_jax.load(path, mesh=_one_device()), genrm_jax.load(path, mesh=_one_device(), dtype="bfloat16")
  split = genrm_jax.load(path, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2))
  assert split.score_many(PAIRS) == pytest.approx(exact.score_many(PAIRS), rel=1e-4)
  assert len(split.engine.params["final_norm"].sharding.device_set) == 8
  refused(("genrm writes no rationales", exact.rationales, *PAIRS[0]))
  assert {p.dtype.name for p in jax.tree.leaves(coarse.engine.params)} == {"bfloat16"}
  assert coarse.engine.config.dtype == "bfloat16"
  got, want = coarse.score(*PAIRS[0]), exact.score(*PAIRS[0])
  assert got != want and got == pytest.approx(want, rel=0.1)
  path = runs["genrm"]
  monkeypatch.setattr(memory, "available_host_bytes", lambda: 5000)
  monkeypatch.setattr(saved.ocp, "PyTreeCheckpointer", lambda: pytest.fail("the arrays were read"))
  message = rf"the arrays of checkpoint {path} take 0\.0 GiB on the host, which has 0\.0 GiB free"
  refused((message, genrm_jax.load, path), (message, genrm_jax.load_params, path))


def test_a_damaged_tokenizer_is_damage_of_its_step(tmp_path, capsys):
  run = saved_runs.run_of(tmp_path, "gsm8k", verifiers__genrm__init_from="")
  saved_runs.save(run, "genrm", step=2, eval_loss=0.5)
  path = saved_runs.save(run, "genrm", step=4, eval_loss=0.9)
  file = path / "2" / "files" / "tokenizer.model"
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  run.path("tokenizer.model").unlink()
  assert genrm_jax.load(path, mesh=_one_device()).step == 4
  assert f"checkpoint {path}/2 is damaged" in capsys.readouterr().err
  (path / "4" / "files" / "tokenizer.model").unlink()
  refused((rf"checkpoint {path}/4 is damaged: no tokenizer file at .*no other whole step", genrm_jax.load, path))


ADAPTERS = {"verifiers__genrm__lora__rank": 2, "verifiers__genrm__init_from": "generator"}


def test_adapters_are_merged_and_may_be_saved_alone(tmp_path):
  paths = {}
  for alone in (False, True):
    run = saved_runs.run_of(tmp_path / str(alone), verifiers__genrm__lora__save_frozen=not alone, **ADAPTERS)
    base = saved_runs.save(run, "generator")
    paths[alone] = saved_runs.save(run, "genrm")
  refused((f"{base}/4 is a run's generator, not a verifier", genrm_jax.load, base))
  size = {alone: sum(f.stat().st_size for f in pathlib.Path(p, "4/state").rglob("*")) for alone, p in paths.items()}
  assert size[True] < 0.7 * size[False]
  whole = genrm_jax.load(paths[False], mesh=_one_device())
  assert "lora" not in whole.engine.params
  params = run.init_params("genrm", run.mesh)
  assert set(params) == {"embedder", "layers", "final_norm", "lora", "lora_scale"}
  unadapted = {name: params[name] for name in ("embedder", "layers", "final_norm")}
  unadapted, merged = jax.device_get((unadapted, dict(whole.engine.params)))
  change = jax.tree.map(lambda a, b: np.abs(a - b).max(), unadapted, merged)
  assert {n: bool(c > 1e-4) for n, c in change["layers"].items() if n[0] in "qkvagud"} == {
    **{n: True for n in ("q", "k", "v", "attn_out")},
    **{n: False for n in ("gate", "up", "down")},
  }
  refused((r"/genrm/4 holds only adapters .* base=.* generator", genrm_jax.load, paths[True]))
  joined = genrm_jax.load(paths[True], base=base, mesh=_one_device())
  assert joined.score_many(PAIRS) == whole.score_many(PAIRS)
  numpy, _ = genrm_jax.load_params(paths[True], base=base)
  jax.tree.map(np.testing.assert_array_equal, numpy, jax.device_get(whole.engine.params))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(run.load_params("genrm", run.mesh)[0]), numpy)
  other = saved_runs.save(saved_runs.run_of(tmp_path / "other", seed=1), "generator")
  message = "/genrm/4 was trained beside other frozen parameters: frozen/embedder"
  refused((message, partial(genrm_jax.load, paths[True], base=other)))

  # Alone in one small file, rounded to bfloat16.
  small = tmp_path / "small"
  export(paths[True], small, "adapters", base)
  assert sorted(p.name for p in small.rglob("*") if p.is_file()) == ["README.md", "adapters.safetensors", "metadata"]
  rounded, manifest = genrm_jax.load_params(small, base=base)
  about = saved.read_manifest(paths[True] / "4")
  assert {k: manifest[k] for k in ("step", "verifier", "scoring")} == {
    k: about[k] for k in ("step", "verifier", "scoring")
  }
  adapters = saved.read_params(paths[True] / "4", about, None)["lora"]
  adapters = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(np.float32), adapters)
  want = lora.merge({**unadapted, "lora": adapters, "lora_scale": params["lora_scale"]})
  jax.tree.map(np.testing.assert_array_equal, rounded, jax.device_get(want))
  scores = genrm_jax.load(small, base=base, mesh=_one_device()).score_many(PAIRS)
  np.testing.assert_allclose(scores, whole.score_many(PAIRS), rtol=0.02)
  refused(
    ("saved alone", partial(export, layout="adapters"), paths[False], tmp_path / "none"),
    ("holds only adapters", genrm_jax.load, small),
    ("trained beside other frozen parameters", partial(genrm_jax.load, base=other), small),
    ("no verifier of that name comes with genrm-jax", genrm_jax.load, "gsm9k"),
  )
  content = bytearray((small / "adapters.safetensors").read_bytes())
  content[-1] ^= 1
  (small / "adapters.safetensors").write_bytes(content)
  refused(("small is damaged: adapters.safetensors differs", partial(genrm_jax.load, base=base), small))


def test_sharding_rules_of_a_config_hold_for_all_that_a_run_builds(tmp_path):
  usual, other = (saved_runs.run_of(tmp_path / rule, model__sharding__embed=rule) for rule in ("fsdp", "data"))
  for run, axis in ((usual, "fsdp"), (other, "data")):
    saved_runs.save(run, "generator")
    for params in (run.init_params("generator", run.mesh), run.load_params("generator", run.mesh)[0]):
      assert params["layers"]["q"].sharding.spec[1] == axis
  assert other.manifest("generator") == usual.manifest("generator"), "the layout is no part of what was trained"


# On what is written.
NO_EFFECT = ("mesh", "engine.mesh", "engine.rows_per_batch", "model.sharding", "data_dir", "report.ns")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp("made")
  run = saved_runs.run_of(made, "gsm8k", seed=7, model__param_dtype="bfloat16")
  export(saved_runs.save(run, "base"), made / "gemma")
  return made / "gemma"


def _run(workdir, folder, **changes):
  changes = {"model__checkpoint": str(folder), **changes}  # the tokenizer is beside it
  config = {f"verifiers__{name}__init_from": "" for name in ("orm", "genrm", "genrm_cot")}
  return saved_runs.run_of(workdir, "gsm8k", **config, **changes)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_verifier_is_trained_from_a_checkpoint(rank, folder, tmp_path):
  run = _run(tmp_path, folder, verifiers__genrm__lora__rank=rank, verifiers__genrm__lora__save_frozen=False)
  checks.check_run(run)
  stages = make_stages(run)
  assert "base" not in [s.name for s in stages], "nothing starts from it"
  chosen = ["release", "tokenizer", "train_genrm", "score_genrm"]
  undeclared = recorded_config.undeclared_reads(run, chosen)
  assert set(undeclared) == set(chosen)
  for stage, keys in undeclared.items():
    # For the manifest, and for the names of the splits; a verifier without rationales has one vote.
    more = {"train": ("votes", "engine.max_tokens"), "score": ("votes", "task")}.get(stage.partition("_")[0], ())
    assert not [key for key in keys if not staging.covers((*NO_EFFECT, *more), key)], stage
  digest = SentencePieceTokenizer(folder / "tokenizer.model").digest
  assert SentencePieceTokenizer(run.path("tokenizer.model")).digest == digest
  path = run.path("checkpoints", "genrm")
  steps = saved.find(path)
  manifest = saved.read_manifest(steps[0])
  assert "files" in manifest["init_from"] and str(folder) not in manifest["init_from"]
  assert manifest["model"]["embed_dim"] == 32
  names = {name.split("/")[1] for name in manifest["arrays"] if name.startswith("params/")}
  assert names == ({"lora"} if rank else {"embedder", "layers", "final_norm"})
  # One device, so that the adapters' base is what was read for training.
  verifier = genrm_jax.load(path, base=folder if rank else None, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
  first = jsonl.read_records(run.path("scores", "genrm.jsonl"), Score)[0]
  problem = next(p for p in run.problems("eval") if p.id == first.problem_id)
  candidate = next(c for c in run.candidates("eval") if (c.problem_id, c.index) == (problem.id, first.candidate_index))
  assert verifier.score(problem.question, candidate.text) == pytest.approx(first.value, rel=1e-3)
  start, _ = genrm_jax.load_params(folder.parent / "checkpoints" / "base")
  now, _ = genrm_jax.load_params(path, base=folder if rank else None)
  moved = jax.tree.map(lambda a, b: float(np.abs(a.astype(np.float32) - b).max()), start, now)
  assert moved["layers"]["q"] > 1e-5, "it was trained"
  assert (moved["layers"]["gate"] > 0) == (not rank), "adapters leave the rest alone"

  if rank:  # Another run takes the adapters instead of training.
    small = tmp_path / "small"
    export(path, small, "adapters", folder)
    config = ml_collections.ConfigDict(run.config.to_dict())
    config.verifiers.genrm.shipped = str(small)
    taking = Run(ml_collections.FrozenConfigDict(config), epath.Path(tmp_path / "taking"))
    staging.run_stages(taking.workdir, taking.config.to_dict(), make_stages(taking), chosen, lambda text: None)
    small_verifier = genrm_jax.load(small, base=folder, mesh=_one_device())
    (taken,) = [s for s in jsonl.read_records(taking.path("scores", "genrm.jsonl"), Score) if _is_of(s, candidate)]
    want = small_verifier.score(problem.question, candidate.text)
    assert taken.value == pytest.approx(want, rel=1e-3) != pytest.approx(first.value, rel=1e-7)
    assert taken.step == manifest["step"] and not taking.path("metrics", "genrm.jsonl").exists()
    assert "not trained in this run" in _notes(taking)[-1].lower()
    config.prompts.verify = "Check: {verdict_question}"
    other = Run(ml_collections.FrozenConfigDict(config), epath.Path(tmp_path / "taking"))
    refused(("small was made by something else:\n.*prompts.verify", fitting.take_shipped, other, "genrm"))

  # The checkpoint may move: the run is still this one, and its training resumes from what it has saved.
  elsewhere, said = tmp_path / "elsewhere" / "renamed", []
  shutil.copytree(folder, elsewhere)
  again = _run(run.workdir, elsewhere, verifiers__genrm__lora__rank=rank, verifiers__genrm__lora__save_frozen=False)

  def start(*names):
    staging.run_stages(again.workdir, again.config.to_dict(), make_stages(again), names, said.append)

  start(*chosen)
  assert said[-1].endswith("nothing was run")
  again.path("stages", "train_genrm.json").unlink()
  start("train_genrm")
  assert [step.name for step in saved.find(path)] == [step.name for step in steps]
  (elsewhere / "model.safetensors").rename(elsewhere / "another.safetensors")
  refused((r"train_genrm: model\.checkpoint is not what stage tokenizer read.*--rerun", start, "train_genrm"))
  other = saved_runs.run_of(tmp_path / "other", "last_letter", model__checkpoint=str(folder))
  refused(("tokenizer char has 102 pieces, but the model's embedding 320 rows", lambda: other.model))
