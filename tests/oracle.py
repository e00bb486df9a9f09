"The supervised losses written out from their definitions: fp64, full logits, one sequence after the other. Slow on purpose."
import math

import torch

ONE_TERM = ("sft", "plw", "dft", "eaft")  # normalised by one sum over prompt and completion


def token_losses(name, logits_TV, ids, lambda_td=0.5, gamma=1.0):
    "Loss of tokens 1..T-1 of one sequence (token 0 is predicted by nothing)"
    logits_TV = logits_TV.double()
    value_T = logits_TV.logsumexp(-1)
    losses = []
    for t in range(len(ids) - 1):
        logp = logits_TV[t, ids[t + 1]] - value_T[t]
        loss = -logp
        if name == "dft": loss = loss * logp.detach().exp()
        if name == "eaft":
            p = logits_TV[t].detach().softmax(-1)
            loss = loss * -(p * p.log()).sum() / math.log(20)
        if name == "irl":
            after = value_T[t + 1] if t + 2 < len(ids) else 0.0  # nothing follows the last token
            loss = loss + lambda_td * (value_T[t] + logp - gamma * after) ** 2
        losses.append(loss)
    return losses


def fraction(name, sequences, w):
    "The loss over a list of (token losses, completion flags), as if they were one long sequence"
    prompt, completion, n_prompt, n_completion = 0.0, 0.0, 0, 0
    for losses, is_completion in sequences:
        for loss, flag in zip(losses, is_completion):
            if flag: completion, n_completion = completion + loss, n_completion + 1
            else: prompt, n_prompt = prompt + loss, n_prompt + 1
    if name in ONE_TERM:
        norm = w * n_prompt + n_completion
        return (w * prompt + completion) / norm if norm else 0.0
    return (w * prompt / n_prompt if n_prompt else 0.0) + (completion / n_completion if n_completion else 0.0)


def oracle(name, model, rows, prompt_loss_weight=0.0, sequence_level=False, lambda_td=0.5, gamma=1.0):
    """The loss of one optimizer step, an fp64 scalar with gradient.

    name: sft, plw, ln-plw, irl, dft or eaft. model: a causal language model (use `.double()` for gradients in fp64), or the list of each row's
    logits [T, V]. rows: all sequences of the step over all micro-batches and ranks, each (ids, completion_mask) without padding; every
    token that is not completion is prompt. Sequences without a weighted token do not count on the sequence level.
    """
    w = 1.0 if name == "sft" else prompt_loss_weight
    sequences = []
    for i, (ids, completion_mask) in enumerate(rows):
        ids = [int(x) for x in ids]
        logits = model[i] if isinstance(model, (list, tuple)) else model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        flags = [bool(x) for x in completion_mask][1:]
        sequences.append((token_losses(name, logits, ids, lambda_td, gamma), flags))
    if not sequence_level: return torch.as_tensor(fraction(name, sequences, w), dtype=torch.float64)
    counted = [s for s in sequences if any(s[1]) or (w > 0 and len(s[1]))]
    total = sum(fraction(name, [s], w) for s in counted)
    return torch.as_tensor(total / max(len(counted), 1), dtype=torch.float64)


def weighted_fraction(name, sequences, w):
    "The loss over a list of (token losses, completion flags, weights of the tokens, weight of the row): four sums over tokens, each token added by itself"
    sums, norms = [0.0, 0.0], [0.0, 0.0]  # of the prompt, of the completion
    for losses, is_completion, weights, row_weight in sequences:
        for loss, flag, weight in zip(losses, is_completion, weights):
            if weight * row_weight == 0: continue
            sums[flag] = sums[flag] + row_weight * weight * loss
            norms[flag] += row_weight * weight
    if name in ONE_TERM:
        norm = w * norms[0] + norms[1]
        return (w * sums[0] + sums[1]) / norm if norm else 0.0
    return sum(part * sums[k] / norms[k] for k, part in enumerate((w, 1.0)) if norms[k])


def weighted_oracle(name, model, rows, prompt_loss_weight=0.0, sequence_level=False, lambda_td=0.5, gamma=1.0):
    """The loss of one optimizer step whose rows have weights, an fp64 scalar with gradient.

    As `oracle`, with rows (ids, completion_mask, weight of each token, weight of the row). On the sequence level the loss of a row is its own
    fraction, and the step's loss their mean weighted by the rows; a row in which nothing has a weight does not count.
    """
    w = 1.0 if name == "sft" else prompt_loss_weight
    sequences = []
    for ids, completion_mask, weights, row_weight in rows:
        ids = [int(x) for x in ids]
        losses = token_losses(name, model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], ids, lambda_td, gamma)
        sequences.append((losses, [bool(x) for x in completion_mask][1:], [float(x) for x in weights][1:], float(row_weight)))
    if not sequence_level: return torch.as_tensor(weighted_fraction(name, sequences, w), dtype=torch.float64)
    total, norm = 0.0, 0.0
    for losses, flags, weights, row_weight in sequences:
        if not any(d > 0 and (flag or w > 0) for d, flag in zip(weights, flags)): continue
        total = total + row_weight * weighted_fraction(name, [(losses, flags, weights, 1.0)], w)
        norm += row_weight
    return torch.as_tensor(total / norm if norm else 0.0, dtype=torch.float64)
