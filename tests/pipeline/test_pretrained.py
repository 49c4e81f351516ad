"""An experiment that starts from a Gemma checkpoint with its own tokenizer, trained in full or by adapters."""

import shutil

import jax
import numpy as np
import pytest
import recorded_config
import saved_runs
from refusals import refused

import genrm_jax
from genrm_jax.data import jsonl
from genrm_jax.export import export
from genrm_jax.pipeline import checks
from genrm_jax.pipeline import stages as staging
from genrm_jax.pipeline.experiment import make_stages
from genrm_jax.records import Score
from genrm_jax.runtime import sharding
from genrm_jax.text.tokenizer import SentencePieceTokenizer
from genrm_jax.training import saved

NO_EFFECT = (
  "mesh",
  "engine.mesh",
  "engine.rows_per_batch",
  "model.sharding",
  "data_dir",
  "report.ns",
)  # on what is written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A Gemma checkpoint of Hugging Face with its tokenizer, in bfloat16."""
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
