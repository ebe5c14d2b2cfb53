"""What a deployment is asked to serve: how requests arrive, how long they are, what they share, and what is promised.

Lengths are mixtures: each part has a share and is fixed, uniform or lognormal, cut at `max_tokens`. Plain values: the
checks are `check`'s, and sampling is by a seeded generator, so one workload and seed give one load.
"""

import math
from random import Random

from ..profiles.errors import BadInput
from ..profiles.frozen import dataclass

P95_SIGMAS = 1.6448536269514722  # the standard normal's 95th percentile
MAX_TOKENS = 1_010_000
MAX_RATE_PER_S = 1e6
MAX_USERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a mixture of lengths in tokens. `low` and `high` are equal for a fixed length, and its bounds for a
    uniform one; with `sigma` above 0 it is lognormal with median `low`, cut at `high`."""

    share: float
    low: int
    high: int
    sigma: float = 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, at least 1."""

    parts: tuple[Part, ...]

    @property
    def max_tokens(self) -> int:
        return max(part.high for part in self.parts)

    def sample(self, rng: Random, count: int) -> list[int]:
        if len(self.parts) == 1:
            return _drawn(rng, self.parts[0], count)
        chosen = rng.choices(range(len(self.parts)), [part.share for part in self.parts], k=count)
        pools = [iter(_drawn(rng, part, chosen.count(place))) for place, part in enumerate(self.parts)]
        return [next(pools[place]) for place in chosen]


def lognormal(share: float, median: int, p95: int, max_tokens: int) -> Part:
    """The lognormal part with this median and 95th percentile (before it is cut)."""
    return Part(share, median, max_tokens, math.log(p95 / median) / P95_SIGMAS)


def _drawn(rng: Random, part: Part, count: int) -> list[int]:
    if part.sigma:
        mu, sigma, high, draw = math.log(part.low), part.sigma, part.high, rng.lognormvariate
        return [min(high, max(1, int(draw(mu, sigma) + 0.5))) for _ in range(count)]
    if part.low == part.high:
        return [part.low] * count
    return [rng.randint(part.low, part.high) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prompt tokens that a share of the requests begin with alike: a system prompt, a document, earlier turns. The
    first `image_tokens` of them are an image, which the vision tower sees only where the cache does not hold it."""

    tokens: int
    share: float
    image_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Images:
    """A share of the requests carries `count` images of its own, of this many tokens altogether."""

    tokens: int
    share: float
    count: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each."""
        return (self.tokens // self.count,) * self.count


@dataclass(frozen=True, slots=True)
class Targets:
    """Promises. None: not promised. TPOT is a request's mean time per output token after the first."""

    p95_ttft_s: float | None = None
    p95_tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """`rate_per_s` for an open load, or `users` who each wait for the answer and then think for `think_s` on average.

    `burstiness` is the shape of the gamma-distributed gaps, as in vLLM's serving benchmark: 1 is Poisson, less is
    burstier. Prompt lengths are without shared prefix and images.
    """

    prompt_tokens: Lengths
    output_tokens: Lengths
    rate_per_s: float | None = None
    users: int | None = None
    think_s: float = 0.0
    burstiness: float = 1.0
    prefix: Prefix | None = None
    images: Images | None = None
    targets: Targets = Targets()

    @property
    def sees_images(self) -> bool:
        return bool(self.images or (self.prefix and self.prefix.image_tokens))

    @property
    def max_request_tokens(self) -> int:
        """The longest that prompt and answer can be together."""
        prefix = self.prefix.tokens if self.prefix else 0
        images = self.images.tokens if self.images else 0
        return self.prompt_tokens.max_tokens + self.output_tokens.max_tokens + prefix + images


@dataclass(frozen=True, slots=True)
class Load:
    """Sampled requests, in order of arrival, column by column.

    `new_tokens` are computed in prefill, `cached_tokens` are found in the prefix cache. Open: `times_s` says when each
    arrives. Closed: `think_s` how long its user waits before it, and `users` how many there are. `images` are the
    tokens of each image that the vision tower must see; None: there are none.
    """

    new_tokens: list[int]
    cached_tokens: list[int]
    output_tokens: list[int]
    times_s: list[float] | None = None
    think_s: list[float] | None = None
    users: int = 0
    images: list[tuple[int, ...]] | None = None


def check(workload: Workload) -> None:
    """BadInput for what no service could be asked: rates and lengths that are not positive and finite, bad shares."""
    if (workload.rate_per_s is None) == (workload.users is None):
        raise BadInput("a workload has either rate_requests_per_s or users: give one of them")
    for name, value, most in (
        ("rate_requests_per_s", workload.rate_per_s, MAX_RATE_PER_S),
        ("users", workload.users, MAX_USERS),
        ("burstiness", workload.burstiness, 1e6),
    ):
        if value is not None and not 0 < value <= most:
            raise BadInput(f"{name} is {value}: give more than 0 and at most {most:,.0f}")
    if not 0 <= workload.think_s <= 1e6:
        raise BadInput(f"think_s is {workload.think_s}: give 0 to 1,000,000 seconds")
    for name, lengths in (("prompt_tokens", workload.prompt_tokens), ("output_tokens", workload.output_tokens)):
        _check_lengths(name, lengths)
    for name, shared in (("shared_prefix", workload.prefix), ("images", workload.images)):
        if shared and not (0 < shared.share <= 1 and 1 <= shared.tokens <= MAX_TOKENS):
            raise BadInput(f"{name}: give a share of more than 0 and at most 1, and 1 to {MAX_TOKENS:,} tokens")
    if workload.prefix and not 0 <= workload.prefix.image_tokens <= workload.prefix.tokens:
        raise BadInput(
            f"shared_prefix: its image has {workload.prefix.image_tokens:,} tokens, more than the prefix around it"
        )
    for name in ("p95_ttft_s", "p95_tpot_s"):
        promised = getattr(workload.targets, name)
        if promised is not None and not 0 < promised < math.inf:
            raise BadInput(f"targets.{name} is {promised}: give seconds, more than 0")


def _check_lengths(name: str, lengths: Lengths) -> None:
    if not lengths.parts:
        raise BadInput(f"{name} has no parts: give at least one")
    total = sum(part.share for part in lengths.parts)
    if not abs(total - 1) <= 1e-6:
        raise BadInput(f"{name}: the shares sum to {total:g}, and must sum to 1")
    for part in lengths.parts:
        if not (0 < part.share <= 1 and 1 <= part.low <= part.high <= MAX_TOKENS and 0 <= part.sigma < 10):
            raise BadInput(
                f"{name}: a part lies outside 1 to {MAX_TOKENS:,} tokens, or its bounds are the wrong way round"
            )
