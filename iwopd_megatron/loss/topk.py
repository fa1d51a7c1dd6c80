"""The dense variant: the teacher's K likeliest tokens, and the student's divergence on them.

At each position the teacher's top K are the support S. Both models are renormalised on S
("renormalised") or get a bucket for the rest of the vocabulary ("tail"), and KL(student || teacher)
is differentiated as a loss ("Revisiting On-Policy Distillation"). "truncated" sums over S without
either: not a divergence, its minimum is not at the teacher.
Shapes: N tokens, K tokens of the support, C tokens and U vocabulary entries of a tile.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

# Smallest probability of the tail: 1 - sum over S in fp32 is exact to about this.
MIN_TAIL = 1e-6


def topk_kl(
    student_logp: torch.Tensor, teacher_logp: torch.Tensor, support: str = "renormalised"
) -> torch.Tensor:
    """Return KL(student || teacher) on the support, nats, `[N]`, differentiable in the student.

    Both fp32 `[N, K]`: log-probs, over the whole vocabulary, of the same K ids. ValueError where
    `support` is none of the three.
    """
    if support == "renormalised":
        student_logp, teacher_logp = student_logp.log_softmax(-1), teacher_logp.log_softmax(-1)
    elif support == "tail":
        student_logp, teacher_logp = _with_tail(student_logp), _with_tail(teacher_logp)
    elif support != "truncated":
        raise ValueError(f"unknown support '{support}'; use renormalised, tail or truncated.")
    return (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)


def _with_tail(logp_NK: torch.Tensor) -> torch.Tensor:
    """Return log-probs `[N, K + 1]` with that of all other tokens last."""
    rest_N = (1 - logp_NK.exp().sum(-1)).clamp(min=MIN_TAIL)
    return torch.cat([logp_NK, rest_N.log()[:, None]], -1)


class RunningTopK:
    """The K largest logits of every row, over vocabulary tiles and then over tensor-parallel ranks.

    Ties go to any of the equal ids. Holds [N, K], never a row of logits.
    """

    def __init__(self, tokens: int, k: int, on: torch.device):
        self.value_NK = torch.full((tokens, k), -torch.inf, device=on)
        self.id_NK = torch.zeros(tokens, k, dtype=torch.int64, device=on)

    def add(self, logits_CU: torch.Tensor, rows: slice, first_id: int) -> None:
        """Take in a tile of fp32 logits of these rows, of ids `first_id` and on."""
        value_CK, column_CK = logits_CU.topk(min(self.value_NK.shape[1], logits_CU.shape[1]))
        value = torch.cat([self.value_NK[rows], value_CK], 1)
        ids = torch.cat([self.id_NK[rows], column_CK + first_id], 1)
        self._keep(rows, value, ids)

    def merge(self, group: dist.ProcessGroup) -> None:
        """Merge with the ranks of `group`, by one all-gather of [N, 2 K] 32-bit numbers a rank."""
        packed = torch.cat([self.value_NK.view(torch.int32), self.id_NK.int()], 1)
        every = packed.new_empty(group.size(), *packed.shape)
        dist.all_gather_into_tensor(every.view(-1, packed.shape[1]), packed, group=group)
        value, ids = every.chunk(2, -1)
        value = value.transpose(0, 1).flatten(1).contiguous().view(torch.float32)
        self._keep(slice(None), value, ids.transpose(0, 1).flatten(1).long())

    def _keep(self, rows: slice, value: torch.Tensor, ids: torch.Tensor) -> None:
        self.value_NK[rows], best = value.topk(self.value_NK.shape[1])
        self.id_NK[rows] = ids.gather(1, best)
