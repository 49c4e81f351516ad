"""Time and memory of loading a full-size checkpoint with random weights, per format, compared with transformers.

    python benchmarks/load_checkpoint.py --size=gemma_2b --folder=/tmp/checkpoints

Writes the checkpoint in both formats (for gemma_2b 5 GB each; kept for the next run), then loads each in its own
process. "over the shards" is the peak memory of the process, minus its memory before loading, minus the bytes of the
parameters, in units of the largest parameter (stacked over layers).
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time

CASES = {
  "released, 1 device": ("released", {"data": 1}),
  "hugging_face, 1 device": ("hugging_face", {"data": 1}),
  "hugging_face, fsdp=8": ("hugging_face", {"fsdp": 8}),
  "transformers": ("hugging_face", None),
}


def write(size: str, folder: pathlib.Path) -> None:
  """Writes random bfloat16 weights in both formats."""
  import jax

  from genrm_jax.checkpoints import hugging_face, released
  from genrm_jax.model import gemma
  from genrm_jax.model.config import get_config

  config = get_config(size, param_dtype="bfloat16")
  missing = [name for name in ("hugging_face", "released") if not (folder / name).exists()]
  if missing:
    params = gemma.init(config, jax.random.key(0))
  for name in missing:
    {"hugging_face": hugging_face, "released": released}[name].save(params, config, folder / name)


def peak_bytes() -> int:
  """Peak memory of this process; getrusage would return its parent's if that is larger."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident_bytes() -> int:
  return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load_ours(path: str, mesh_sizes: dict[str, int]) -> dict[str, float]:
  import jax

  from genrm_jax.checkpoints import pretrained
  from genrm_jax.runtime import sharding

  mesh = sharding.make_mesh(**mesh_sizes)
  before, start = resident_bytes(), time.monotonic()
  params, _ = pretrained.load(path, mesh, param_dtype="bfloat16")
  jax.block_until_ready(params)
  leaves = jax.tree.leaves(params)
  return {
    "seconds": time.monotonic() - start,
    "peak": peak_bytes() - before,
    "params": sum(leaf.nbytes for leaf in leaves),
    "largest": max(leaf.nbytes for leaf in leaves),
  }


def load_transformers(path: str) -> dict[str, float]:
  import torch
  import transformers

  before, start = resident_bytes(), time.monotonic()
  model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
  # Memory-mapped files are read on access.
  sum(float(p.view(torch.uint8).sum()) for p in model.parameters())
  sizes = [p.numel() * p.element_size() for p in model.parameters()]
  layers = model.config.num_hidden_layers
  return {
    "seconds": time.monotonic() - start,
    "peak": peak_bytes() - before,
    "params": sum(sizes),
    "largest": max(layers * model.config.hidden_size * model.config.intermediate_size * 2, max(sizes)),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="gemma_2b")
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--case", choices=CASES, help="used internally by the subprocesses")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  if args.case:
    name, mesh_sizes = CASES[args.case]
    if mesh_sizes is not None:
      os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={math.prod(mesh_sizes.values())}"
    path = str(args.folder / name)
    print(json.dumps(load_transformers(path) if mesh_sizes is None else load_ours(path, mesh_sizes)))
    return
  write(args.size, args.folder)
  print(
    f"{args.size}, bfloat16\n{'':24}{'seconds':>9}{'GB/s':>7}{'peak GiB':>10}{'params GiB':>12}{'over the shards':>17}"
  )
  for case in CASES:
    command = [sys.executable, __file__, f"--size={args.size}", f"--folder={args.folder}", f"--case={case}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      print(f"{case:24}{done.stderr.strip().splitlines()[-1]}")
      continue
    r = json.loads(done.stdout.splitlines()[-1])
    over = (r["peak"] - r["params"]) / r["largest"]
    print(
      f"{case:24}{r['seconds']:9.1f}{r['params'] / r['seconds'] / 1e9:7.2f}{r['peak'] / 2**30:10.2f}"
      f"{r['params'] / 2**30:12.2f}{over:16.2f}x"
    )


if __name__ == "__main__":
  main()
