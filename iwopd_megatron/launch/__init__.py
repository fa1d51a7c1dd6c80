"""A recipe on a cluster: its roles, submitted through NeMo-Run and kept alive on every node.

In come a recipe and a cluster profile; out goes a job folder, an agent on every node that
starts the role's processes again when they die, and what `iwopd status` and `iwopd attach`
show. No torch.
"""

__all__ = [
    "launch",
    "log",
    "nemo",
    "profile",
    "rehearsed",
    "rendezvous",
    "roles",
    "status",
    "submit",
]
