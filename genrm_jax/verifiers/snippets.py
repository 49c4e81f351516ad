"""Python that scores an exported verifier with transformers alone: bodies of `score` for model cards (export.py)."""

READ_LOGITS = """\
  logits = model(torch.tensor([prompt(question, solution)])).logits[0, -1].float()
  return {value}"""

LIKELIHOOD = """\
  start, written = prompt(question, ""), [*ids(solution), {end}]
  logits = model(torch.tensor([start + written])).logits[0, len(start) - 1 : -1].double()
  return logits.log_softmax(-1).gather(-1, torch.tensor(written)[:, None]).sum().exp().item()"""

SAMPLE_VOTES = """\
  start = prompt(question, solution)
  out = model.generate(
    torch.tensor([start] * {num_votes}), max_new_tokens={max_new_tokens}, do_sample={do_sample}, {sampling}
    output_logits=True, return_dict_in_generate=True,
  )
  asked, votes = ids({asked!r}), []
  for k, row in enumerate(out.sequences[:, len(start):].tolist()):
    for t in range(len(asked), len(row)):
      if row[t - len(asked):t] == asked:
        votes.append(out.logits[t][k].float().softmax(-1)[{yes}].item())
        break
  return sum(votes) / len(votes) if votes else None"""
