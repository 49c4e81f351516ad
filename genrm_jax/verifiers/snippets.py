"""Bodies of `score(question, solution)` for model cards: they need transformers only (used by export.py)."""

READ_LOGITS = """\
  logits = model(torch.tensor([prompt(question, solution)])).logits[0, -1].float()
  return {value}"""

LIKELIHOOD = """\
  start, continuation = prompt(question, ""), [*ids(solution), {end}]
  logits = model(torch.tensor([start + continuation])).logits[0, len(start) - 1 : -1].double()
  return logits.log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None]).sum().exp().item()"""

SAMPLE_VOTES = """\
  start = prompt(question, solution)
  out = model.generate(
    torch.tensor([start] * {num_votes}), max_new_tokens={max_new_tokens}, do_sample={do_sample}, {sampling}
    output_logits=True, return_dict_in_generate=True,
  )
  question_ids, votes = ids({question!r}), []
  n = len(question_ids)
  for k, row in enumerate(out.sequences[:, len(start):].tolist()):
    verdicts = [t for t in range(n, len(row)) if row[t - n:t] == question_ids and row[t] in ({yes}, {no})]
    if len({{row[t] for t in verdicts}}) == 1:  # neither missing nor contradictory
      votes.append(out.logits[verdicts[-1]][k].float().softmax(-1)[{yes}].item())
  return sum(votes) / len(votes) if votes else None"""
