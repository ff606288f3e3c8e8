"""A server as it is planned: which engine, on what, how long a context, how many users, what its cache holds, and the
command that starts it. `qtool serve`, `qtool prove` and what is written for a cluster take it from here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qtool import QtoolError
from qtool.convert.formats.table import in_safetensors, runs_in
from qtool.evaluate.engines.facts import EngineFacts, Launch, Serving
from qtool.evaluate.engines.table import SERVERS
from qtool.sizing.accelerators import Accelerator
from qtool.sizing.fit import GIB, Estimate, Setting, estimate_of, fits, largest_context, split_faults
from qtool.sizing.formats import SOURCE, Weights, artifact_weights, weights_of
from qtool.sizing.headers import Headers
from qtool.sizing.kv_cache import cached_windows, check_kv_dtype, token_bytes
from qtool.sizing.serve_command import refusals, serving_of

USERS = 4  # at once, where nobody says how many
LEAST = 64  # tokens of a context below which no server is worth starting
DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Wish:
    """What a server is to be. ``engine``: None for the first that runs the format; ``context``: tokens of each user, 0
    for the longest that fits; ``kv_dtype``: empty for the engine's own choice; ``dtype``: of the activations, empty for
    what the files say; ``chunk``: tokens of one step of a prompt, 0 for the engine's own choice; ``cards``: that share
    the model."""

    card: Accelerator
    engine: str | None = None
    cards: int = 1
    context: int = 0
    users: int = USERS
    kv_dtype: str = ""
    dtype: str = ""
    chunk: int = 0
    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True)
class PlannedServer:
    """``estimate``: bytes and seconds with all users at their whole context; ``serving``: what the command says."""

    headers: Headers
    setting: Setting
    estimate: Estimate
    serving: Serving

    @property
    def facts(self) -> EngineFacts:
        return self.setting.facts

    @property
    def launch(self) -> Launch:
        """The command."""
        assert self.facts.launch is not None
        return self.facts.launch(self.serving)

    @property
    def url(self) -> str:
        """Where it will answer."""
        host = f"[{self.serving.host}]" if ":" in self.serving.host else self.serving.host
        return f"http://{host}:{self.serving.port}"

    @property
    def token_bytes(self) -> int:
        """Of the cache, for one token, on all cards."""
        return block_bytes(self.setting) // self.facts.block

    @property
    def blocks(self) -> int | None:
        """Of the cache, those that the engine keeps for itself included; None where layers slide, each over its own."""
        if any(window is not None for window in cached_windows(self.setting.geometry, self.facts)):
            return None
        each = -(-self.serving.context // self.facts.block)
        return each * self.serving.sequences + self.facts.spare_blocks


def block_bytes(setting: Setting) -> int:
    """Of one block of the cache, on all cards."""
    ranks = setting.at_once
    each = token_bytes(setting.geometry, setting.facts, setting.kv_dtype, ranks)
    return each * setting.facts.block * (setting.cards if ranks > 1 else 1)


def plan_server(headers: Headers, wish: Wish) -> PlannedServer:
    """Raises QtoolError: exit 2 where the engine does not serve such a model, exit 3 where the card is too small, with
    what it needs."""
    weights = artifact_weights(headers) if headers.quantized else weights_of(headers, SOURCE)
    facts = _engine(headers, weights, wish).on(wish.card)
    kind = wish.kv_dtype or facts.cache_types[0].name
    check_kv_dtype(headers.geometry, facts, kind)
    setting = Setting(headers.geometry, weights, facts, wish.card, wish.cards, kind)
    if wrong := [*refusals(headers, setting), *split_faults(setting)]:
        raise QtoolError(f"{headers.place}: {facts.name} does not serve it: {'; '.join(wrong)}.")
    context = _context(headers, setting, wish)
    serving = serving_of(headers, setting, context, wish.users)
    serving = replace(serving, dtype=wish.dtype, prefill=wish.chunk or serving.prefill, host=wish.host, port=wish.port)
    return PlannedServer(headers, setting, estimate_of(setting, context, wish.users), serving)


def _engine(headers: Headers, weights: Weights, wish: Wish) -> EngineFacts:
    named = [runtime.engine for runtime in runs_in(weights.family) if runtime.engine in SERVERS]
    name = wish.engine or next(iter(named), next(iter(SERVERS)))
    if name not in SERVERS:
        raise QtoolError(f"--engine {name}: not a server qtool starts. Known: {', '.join(SERVERS)}.")
    facts = SERVERS[name]
    if facts.gguf == in_safetensors(weights.family):
        others = [other.name for other in SERVERS.values() if other.gguf != facts.gguf]
        why = f" ({facts.refuses_gguf})" if headers.gguf is not None and facts.refuses_gguf else ""
        raise QtoolError(f"{headers.place}: {name} does not load it{why}. Take --engine {' or '.join(others)}.")
    if refused := facts.refuses_card(wish.card):
        raise QtoolError(f"--engine {name}: {refused}.")
    return facts


def _context(headers: Headers, setting: Setting, wish: Wish) -> int:
    """Tokens of each user. Raises QtoolError for more than the model was made for, or than fits."""
    most = setting.geometry.max_context
    if wish.context and most and wish.context > most:
        raise QtoolError(
            f"--context {wish.context}: {headers.name} was made for {most:,} tokens (max_position_embeddings in "
            "config.json)."
        )
    longest = largest_context(setting, wish.users)
    context = wish.context or longest
    if context < min(LEAST, most or LEAST) or not fits(setting, context, wish.users):
        raise _too_large(headers, setting, wish, context or LEAST, longest)
    return context


def _too_large(headers: Headers, setting: Setting, wish: Wish, context: int, longest: int) -> QtoolError:
    found = estimate_of(setting, context, wish.users)
    alone = largest_context(setting, 1)
    if longest >= LEAST:
        way = f"{wish.users} of them can have {longest:,} tokens each: --context {longest}"
    elif alone >= LEAST:
        way = f"one alone can have {alone:,} tokens: --users 1 --context {alone}"
    else:
        way = "`qtool plan` says which format or card holds it"
    needed = f"{found.total / GIB:.2f} GiB ({found.weights / GIB:.2f} weights, {found.cache / GIB:.2f} cache, "
    needed += f"{found.overhead.total / GIB:.2f} beside them) of {found.limit / GIB:.2f}"
    return QtoolError(
        f"{headers.place}: too large for {setting.cards} x {setting.card.key}: {wish.users} users of {context:,} "
        f"tokens need {needed}; {way}.",
        exit_code=3,
    )
