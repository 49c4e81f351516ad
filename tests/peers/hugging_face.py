"""Tiny random Gemma models of transformers, on CPU, with their files and logits.

Needs torch and transformers, which are imported lazily.
"""

import pathlib
from typing import Any

import numpy as np

# Lengths of the rows of a golden. The first is longer than twice the window; the others are padded on the right.
LENGTHS = (24, 11, 17, 5)
_TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=48)
_TINY |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
_WINDOW = 5
_CAPS = {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0}
_GEMMA2 = dict(num_hidden_layers=4, sliding_window=_WINDOW, query_pre_attn_scalar=20, **_CAPS)
_ROPE: dict[str, Any] = {
  "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
  "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
}
_GEMMA3 = _TINY | dict(num_hidden_layers=7, sliding_window=_WINDOW, query_pre_attn_scalar=24, rope_parameters=_ROPE)
_IMAGES = dict(hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
_IMAGES |= dict(image_size=8, patch_size=4)

# The class, its configuration, and the dtype of the files. Caps are small enough to affect most logits.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
  "hf_gemma1_mqa": ("Gemma", _TINY | {"num_hidden_layers": 3, "num_key_value_heads": 1}, "float32"),
  "hf_gemma1_mha": ("Gemma", _TINY | {"num_hidden_layers": 3, "num_key_value_heads": 4}, "float32"),
  "hf_gemma2": ("Gemma2", _TINY | _GEMMA2, "float32"),
  "hf_gemma3": ("Gemma3Text", _GEMMA3, "float32"),
  # Like the larger Gemma 3 releases: with an image encoder, in bfloat16, in several files.
  "hf_gemma3_images": ("Gemma3", _GEMMA3, "bfloat16"),
}


def model(case: str, seed: int = 0) -> Any:
  """The model of a case in float32, with weights that are exact in the dtype of its files."""
  import torch
  import transformers

  family, fields, dtype = CASES[case]
  torch.manual_seed(seed)
  if family == "Gemma3":
    text = transformers.Gemma3TextConfig(**fields)
    config = transformers.Gemma3Config(
      text_config=text, vision_config=transformers.SiglipVisionConfig(**_IMAGES), mm_tokens_per_image=1
    )
    made = transformers.Gemma3ForConditionalGeneration(config)
  else:
    config = getattr(transformers, f"{family}Config")(**fields)
    made = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)
  made.set_attn_implementation("eager")
  with torch.no_grad():
    for name, weight in made.named_parameters():
      # Natural scale keeps the size of activations from layer to layer; the scales of norms are far from 0.
      is_norm = weight.ndim == 1
      std = 0.3 if is_norm else weight.shape[-1] ** -0.5
      weight.copy_((torch.randn_like(weight) * std).to(getattr(torch, dtype)))
      assert is_norm or "norm" not in name
  return made.eval()


def tokens() -> np.ndarray:
  rng = np.random.default_rng(0)
  padded_BT = rng.integers(1, _TINY["vocab_size"], (len(LENGTHS), max(LENGTHS)))
  return (padded_BT * (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None])).astype(np.int32)


def logits(made: Any, tokens_BT: np.ndarray) -> np.ndarray:
  import torch

  given = {"input_ids": torch.tensor(tokens_BT).long(), "attention_mask": torch.tensor(tokens_BT > 0).long()}
  with torch.no_grad():
    return made(**given).logits.float().numpy()


def save(made: Any, folder: pathlib.Path) -> None:
  """Writes the model's files in its own dtype; bfloat16 ones in several shards."""
  made.save_pretrained(folder, max_shard_size="60KB" if "bfloat16" in str(made.dtype) else "5GB")
  (folder / "generation_config.json").unlink(missing_ok=True)


def make(case: str, folder: pathlib.Path) -> None:
  """Writes folder/checkpoint and folder/logits.npz: tokens, and their logits in float32 and in bfloat16."""
  import torch

  made, tokens_BT = model(case), tokens()
  exact = logits(made, tokens_BT)
  made = made.to(torch.bfloat16)
  fast = logits(made, tokens_BT)
  save(made if CASES[case][2] == "bfloat16" else model(case), folder / "checkpoint")
  np.savez_compressed(folder / "logits.npz", tokens=tokens_BT, logits=exact, logits_bfloat16=fast)
