"""Sampled requests: when they come, how long they are, and how much of each prompt the prefix cache already holds."""

from itertools import accumulate
from random import Random

from .workload import Load, Workload


def sampled(workload: Workload, count: int, seed: int, block_tokens: int, share: float = 1.0) -> Load:
    """`count` requests of one replica that gets `share` of the workload, dealt in turn (round robin).

    In turn means that of n equal replicas each gets every n-th request: the gaps of a gamma process with n times the
    shape, smoother than the whole stream. Of users each replica keeps its own. A shared prefix is reused in whole
    blocks of `block_tokens` (1: every token; vLLM's blocks of these models hold hundreds), and at least one token of
    a prompt is computed. An image within the reused blocks of the prefix is not seen by the vision tower again.
    """
    rng = Random(seed)
    prompts = workload.prompt_tokens.sample(rng, count)
    outputs = workload.output_tokens.sample(rng, count)
    cached = [0] * count
    images: list[tuple[int, ...]] = [()] * count
    if workload.prefix:
        tokens, hits = workload.prefix.tokens, workload.prefix.share
        reused = tokens // block_tokens * block_tokens if block_tokens else 0
        unseen = (workload.prefix.image_tokens,) if workload.prefix.image_tokens > reused else ()
        for place in range(count):
            if rng.random() < hits:
                prompts[place] += tokens - reused
                cached[place] = reused
                images[place] = unseen
    if workload.images:
        tokens, hits, sizes = workload.images.tokens, workload.images.share, workload.images.sizes
        for place in range(count):
            if rng.random() < hits:
                prompts[place] += tokens
                images[place] += sizes
    seen = images if any(images) else None
    if workload.users is not None:
        users = max(1, round(workload.users * share))
        mean = workload.think_s
        think = [rng.expovariate(1 / mean) if mean else 0.0 for _ in range(count)]
        return Load(prompts, cached, outputs, think_s=think, users=users, images=seen)
    rate, shape = (workload.rate_per_s or 0) * share, workload.burstiness / share
    return Load(prompts, cached, outputs, times_s=arrival_times(rng, rate, shape, count), images=seen)


def arrival_times(rng: Random, rate_per_s: float, shape: float, count: int) -> list[float]:
    """Seconds of `count` arrivals with gamma-distributed gaps of mean 1 / rate and the given shape; 1 is Poisson."""
    if shape == 1:
        draw = rng.expovariate
        return list(accumulate(draw(rate_per_s) for _ in range(count)))
    gamma, scale = rng.gammavariate, 1 / (rate_per_s * shape)
    return list(accumulate(gamma(shape, scale) for _ in range(count)))
