"""torch.compile without freezing, and with all that it can tune."""

from __future__ import annotations

import torch

from .rivals import Entry, Job, rival


def _compiled(job: Job, **options: bool) -> Entry:
    torch.compiler.reset()
    net = job.plain().to(memory_format=torch.channels_last)
    return Entry(torch.compile(net, options=options), True, net)


@rival("compile default", "torch.compile of torch's own layers in channels_last, no options")
def default(job: Job) -> Entry:
    job.only("infer")  # in training "compile" is just this
    return _compiled(job)


@rival("compile max-autotune", "torch.compile with max_autotune, in channels_last; frozen for inference")
def max_autotune(job: Job) -> Entry:
    if job.mode == "train" and not job.x.is_cuda:
        raise NotImplementedError("in training on a CPU it has nothing to tune")
    options = {"max_autotune": True, "coordinate_descent_tuning": job.x.is_cuda}
    return _compiled(job, **options, **({"freezing": True} if job.mode == "infer" else {}))
