"""Settings: typed, frozen, one TOML file for the whole system.

``load`` reads the file, then applies ``LIVEDRAFT_SECTION__KEY=value`` from the environment, where a list is its entries
by commas.  Unknown keys are errors: a setting that is silently ignored is a bug that takes a day to find.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import msgspec
from livedraft.contracts.engines import EngineAddress, parse
from livedraft.contracts.errors import SettingsError


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every section."""


class Engine(_Section, frozen=True, kw_only=True):
    """The embedded engine (``local:``) or engines in processes of their own."""

    #: ``local:``, or where gateway and controller find the engines: ``http://host:port`` for `livedraft engine`,
    #: ``sglang+http://host:port[?admin=port]`` for SGLang; several separated by commas.  SGLang's plugin is
    #: administered on the port after SGLang's, unless ``admin`` names another; ``?plugin=no`` says that it has none.
    url: str = "local:"
    #: Where `livedraft engine` keeps the drafter that it starts with while the registry is down.
    folder: str = "runs/live/engine"
    #: Folder or Hugging Face id of the target; "bundled" is the one that ships with the project.
    target: str = "bundled"
    #: Folder of the drafter to begin with, which SGLang is started with, too; "": a fresh one is written.  See
    #: `livedraft drafts init` and `livedraft drafts import`.
    drafter: str = ""
    #: Requests decoded together.
    max_running: int = 8
    #: Requests waiting before new ones are refused with 503.
    max_waiting: int = 256
    #: Tokens of prompt + output; 0 takes the target's own limit.
    context_length: int = 0
    #: torch threads of the engine's process.
    threads: int = 1
    #: Draft tokens per round along a chain, or levels of a tree; 0 never speculates.
    draft_depth: int = 4
    #: Children per node; 1 is a chain.
    tree_topk: int = 1
    #: Proposed nodes kept in a tree round.
    tree_nodes: int = 12
    #: Whether the engine may choose a shallower depth, or none, by measured goodput.
    adaptive_depth: bool = True
    #: Target candidates recorded per node.
    capture_topk: int = 32
    #: Rows of the drafter's lm_head: the most frequent tokens; 0 keeps the whole vocabulary.
    draft_vocab: int = 0
    #: Width of a new drafter's MLP; 0 takes the target's.
    draft_intermediate: int = 0

    @property
    def remote(self) -> tuple[EngineAddress, ...]:
        """The engines in other processes; none for ``local:``.  Raises SettingsError."""
        return parse(self.url)


class Sglang(_Section, frozen=True, kw_only=True):
    """The plugin inside SGLang; the file is found by LIVEDRAFT_CONFIG in SGLang's environment."""

    #: Where the engine's administration listens; ``gateway.admin_key`` guards it.
    admin_host: str = "127.0.0.1"
    #: 0: SGLang's own port + 1.
    admin_port: int = 0


class Gateway(_Section, frozen=True, kw_only=True):
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    port: int = 8000
    #: File with one API key a line (``key`` or ``key tenant``); none: no key is asked for.
    api_keys_file: str | None = None
    #: Key for the ``/admin`` routes; none: they answer only to the loopback interface.
    admin_key: str | None = None
    #: Secret that gateway and engines share: an engine takes the tenant from a gateway that sends it, and believes
    #: nobody else.  SGLang's `--api-key` is the same secret; its `--admin-api-key`, where it has one and no plugin,
    #: is ``admin_key``.
    engine_key: str | None = None
    #: Seconds between two looks at each engine.
    health_s: float = 1.0
    #: Seconds without a byte after which a request to an engine is given up.
    engine_timeout_s: float = 600.0
    max_body_bytes: int = 1 << 20
    max_tokens_limit: int = 1024
    #: Most choices (``n``) per request.
    max_choices: int = 8
    #: Seconds running requests get on shutdown.
    drain_s: float = 10.0


#: A name as files of keys have it.  Any other would silently opt nobody out.
Tenant = Annotated[str, msgspec.Meta(pattern=r"^[^\s,]+$")]


class Traces(_Section, frozen=True, kw_only=True):
    """The trace stream."""

    #: ``spool:///absolute/path``, ``spool://relative/path`` or ``kafka://host:port[,host:port]`` (see [kafka]); an
    #: engine may instead hand its traces to a relay at ``relay+tcp://host:port`` (see [relay]).
    url: str = "spool://runs/live/traces"
    #: Total size kept; the oldest segments go first.
    retain_bytes: int = 2 << 30
    segment_bytes: int = 16 << 20
    #: "always" (each batch), "interval" (once a second) or "never" (the kernel decides).
    fsync: Literal["always", "interval", "never"] = "interval"
    #: Bytes of traces that may wait in memory, those on their way to a broker included, before new ones are dropped.
    buffer_bytes: int = 64 << 20
    #: Largest message; longer traces are cut into chunks.
    message_bytes: int = 1 << 20
    #: The target's hidden states, by far the most of a trace: "inline" sends them, "recompute" leaves it to trainer
    #: and controller to run the target over the text again (see ``trainer.recompute``).
    features: Literal["inline", "recompute"] = "inline"
    #: In what they are sent: "bf16", or "fp8": e4m3 with one scale a position, in half the bytes.
    feature_dtype: Literal["bf16", "fp8"] = "bf16"
    #: Fraction of requests captured.
    sample_rate: float = 1.0
    #: Fraction of requests held out of training as the gate's evidence.
    held_out: float = 0.1
    #: "secrets" drops traces whose text holds what looks like an e-mail address, a key or a card number.
    redact: Literal["nothing", "secrets"] = "nothing"
    #: Tenants never captured; in the environment LIVEDRAFT_TRACES__OPTED_OUT=acme,other.  Engines and gateway each keep
    #: to their own list.
    opted_out: tuple[Tenant, ...] = ()


class Kafka(_Section, frozen=True, kw_only=True):
    """The broker behind a ``kafka://`` URL; without one nothing here is read."""

    #: Topics: ``<prefix>.traces``, ``<prefix>.drafts``, ``<prefix>.swaps`` and ``<prefix>.dead``.
    prefix: str = "livedraft"
    #: Whether to create topics that do not exist; existing ones are left as they are.
    create_topics: bool = True
    #: Of ``<prefix>.traces``: the most consumers of a group that can share it.  The other topics have one.
    partitions: int = 8
    #: Copies of each partition; a message is acknowledged once all in-sync ones have it.
    replication: int = 1
    #: Age, and bytes per partition, up to which messages are kept.
    retention_hours: float = 24.0
    retention_bytes: int = 4 << 30
    #: Largest message and batch, of topics and clients; above ``traces.message_bytes``.
    max_message_bytes: int = 4 << 20
    #: Compression of batches.  Features are compressed already, so this costs more than it saves on them.
    compression: Literal["none", "zstd"] = "none"
    #: Milliseconds that a batch may wait for more messages.
    linger_ms: int = 5
    #: Seconds after which a message without acknowledgement is given up: to ``spill``, or dropped.
    delivery_timeout_s: float = 30.0
    #: Folder for traces that the broker did not acknowledge, sent in order when it answers again; none: they are
    #: dropped and counted.  One process per folder.
    spill: str | None = None
    #: Size of the spill from which on traces are dropped.
    spill_bytes: int = 2 << 30
    #: Name of this consumer within its group, the same after a restart ("": the host's).  Trainers that share a host
    #: need one each: LIVEDRAFT_KAFKA__MEMBER=second.
    member: str = ""
    #: Seconds without a heartbeat after which a consumer's partitions go to the others of its group.
    session_timeout_s: float = 45.0
    #: Consumer group that copies unreadable records to ``<prefix>.dead``; one, so that each is copied once.
    dead_letter_group: str = "trainer"
    #: "plaintext", "ssl", "sasl_plaintext" or "sasl_ssl".
    security: Literal["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"] = "plaintext"
    #: PEM files: authorities to trust (none: the system's), and our own certificate and key for mutual TLS.
    tls_ca: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    #: Whether the broker's certificate must name its host.
    tls_check_hostname: bool = True
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    sasl_username: str | None = None
    #: File with the password on its first line; or LIVEDRAFT_KAFKA__SASL_PASSWORD in the environment.
    sasl_password_file: str | None = None
    sasl_password: str | None = None


class Relay(_Section, frozen=True, kw_only=True):
    """The relay between engines and the stream; what it publishes to is ``traces.url``."""

    #: Where it takes traces from engines.  They come in the clear and from whoever reaches the port.
    listen: str = "tcp://127.0.0.1:5555"
    #: Largest trace an engine may send.
    max_trace_bytes: int = 64 << 20


class Metrics(_Section, frozen=True, kw_only=True):
    """``/metrics`` and ``/healthz`` of relay, trainer and controller; engine and gateway have them on their port."""

    host: str = "127.0.0.1"
    #: 0: none.
    port: int = 0


#: What ``trainer.objective`` can name: those that judge any node by the target's distribution there, which the discard
#: term needs, and those that need committed text.
DIVERGENCES = ("forward_kl", "reverse_kl", "total_variation", "lk_log", "lk_hybrid")
ON_COMMITTED_TEXT = ("accept_length", "ntp", "policy_gradient")
#: What ``trainer.parallel`` can name.
PARALLEL = ("ddp", "fsdp2")


class Trainer(_Section, frozen=True, kw_only=True):
    """The learning process."""

    threads: int = 1
    #: How ranks under torchrun share the weights: "ddp", all have all of them (torch's DistributedDataParallel), or
    #: "fsdp2", each has a part of them and of the optimiser's state (torch's fully_shard).  One process ignores it.
    parallel: str = "ddp"
    #: OS niceness: serving goes first.
    nice: int = 15
    #: AdamW: gains, the head, and fc (there divided by the features' size).
    learning_rate: float = 1e-3
    #: Muon: the matrices of the drafter's layer.
    matrix_learning_rate: float = 6e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 10.0
    #: Steps over which the learning rate rises to its constant value.
    warmup_steps: int = 10
    #: Which traces trainer and controller complete by running the target over their text: "never" any; "absent": those
    #: without features, and those of engines that told no more than text; "partial": also those whose features begin
    #: behind a cached prefix.  The target is read when the first one needs it, and its weights stay in memory, in the
    #: type that ``precision`` comes to.
    recompute: Literal["never", "absent", "partial"] = "absent"
    #: Positions that go through the target at once: bounds the memory of it.
    recompute_tokens: int = 2048
    #: Of matrix products (weights stay float32): "auto" takes bfloat16 where the processor has tiles for it (AMX).
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    #: Deepest unroll on the drafter's own outputs, reached as its chains grow longer; at least the serving depth.
    unroll: int = 4
    #: Positions of a trace from which chains are unrolled in a step: one in so many, others each time.  Neighbours
    #: teach nearly the same, so half of them in twice as many steps teach more in the same time.
    root_every: int = 2
    #: Weight of depth k is ``decay ** k``.
    decay: float = 0.8
    #: Whether the head learns too, or stays the target's: a third of a step's products, for little.
    head: Literal["frozen", "trained"] = "frozen"
    #: Share of the past that each step leaves in the running mean of the weights, which is what is published.
    average: float = 0.98
    #: Traces in a step, of all ranks together: at most ``fresh_share`` of them new while others are left to fill it,
    #: ``rehearse_share`` from long memory.  Three eighths of it forget next to nothing after a shift, where one eighth
    #: forgot a tenth, and the new traffic is learned as fast: it is of passes over it that a share is taken.
    batch_traces: int = 16
    fresh_share: float = 0.5
    rehearse_share: float = 0.375
    #: Tokens of a trace trained on at once; longer ones are cut.
    window: int = 192
    #: Traces kept: half the most recent ones, half a long memory stratified by domain.
    replay_traces: int = 512
    #: Times a recent trace may be trained on, its first included.
    max_uses: int = 24
    #: Steps for each admitted trace; 0 learns as fast as time allows.  Any other value makes the weights a
    #: function of the stream alone (lockstep).
    steps_per_trace: float = 0.0
    #: Whether a greedy request teaches its best token alone instead of the target's distribution.
    hard_greedy: bool = False
    #: What is minimised on committed positions: the name of one term, or a table of names and weights as in
    #: ``objective = { forward_kl = 1.0, ntp = 0.1 }``.  Formulas and limits: kernels/divergence.py and
    #: trainer/objective.py.
    #:   forward_kl, reverse_kl    KL(target || drafter), KL(drafter || target)
    #:   total_variation           1 - acceptance
    #:   lk_log, lk_hybrid         LK losses: -log acceptance; KL while acceptance is low, then total variation
    #:   accept_length             draft tokens lost of each chain, the product of its acceptances differentiated
    #:   ntp                       cross-entropy of the committed token
    #:   policy_gradient           clipped, on what was proposed and how far it was accepted (sampled chains only)
    objective: str | dict[str, float] = "forward_kl"
    #: Weight of the discard term, the first five on rejected proposals; 0 switches it off and saves its time.  At equal
    #: processor time 0.1 gains on the first day and loses where the traffic changes and comes back: docs/learning.md.
    discard: float = 0.0
    #: Rejected nodes deeper than this (1 is a round's first) teach nothing; 0 sets no limit but the unroll.
    discard_depth: int = 0
    #: Rejected nodes whose token was not among the target's so many likeliest teach nothing; 0 sets no limit.
    discard_topk: int = 0
    #: Most that one proposal may count for more today than when it was drawn: truncation of each importance weight.
    importance_cap: float = 1.0
    #: Rejections by a drafter this many versions back or more are not used.
    max_version_lag: int = 20
    #: Candidates are published when the accept length of training has grown by this share since the last, but neither
    #: sooner than ``publish_least_s`` nor later than ``publish_every_s`` seconds, as long as something was learned.
    publish_gain: float = 0.03
    publish_least_s: float = 10.0
    publish_every_s: float = 30.0
    #: Share of the target's probability on tokens that the drafter cannot propose (``engine.draft_vocab``), over which,
    #: for ``excluded_steps`` steps on end, the trainer warns: see `livedraft drafts refresh-vocabulary`.
    excluded_limit: float = 0.05
    excluded_steps: int = 500
    #: Growth of the accept length per 100 steps below which there is nothing to gain: after three times in a row it
    #: learns from each new trace once only, until acceptance falls or grows again.  Below -1 it never rests.
    rest_gain: float = 0.005
    #: Seconds between checkpoints.
    checkpoint_every_s: float = 20.0
    #: Where checkpoints and candidate folders are kept.
    folder: str = "runs/live/trainer"
    seed: int = 0

    def __post_init__(self) -> None:
        terms = self.objective_terms
        if unknown := [name for name in terms if name not in DIVERGENCES + ON_COMMITTED_TEXT]:
            known = ", ".join(DIVERGENCES + ON_COMMITTED_TEXT)
            raise ValueError(f"objective: unknown {', '.join(map(repr, unknown))}, expected names of {known}")
        if not terms or not all(0 < weight < math.inf for weight in terms.values()):
            raise ValueError(f"objective: {self.objective!r}, expected at least one name, with weights above 0")
        if self.discard < 0 or (self.discard and not terms.keys() & set(DIVERGENCES)):
            needed = ", ".join(DIVERGENCES)
            raise ValueError(f"discard: {self.discard}, expected 0, or above 0 with one of {needed} in the objective")
        for name in ("discard_depth", "discard_topk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 (no limit) or more")
        if self.recompute_tokens < 1:
            raise ValueError(f"recompute_tokens: {self.recompute_tokens}, expected 1 or more")
        if self.parallel not in PARALLEL:
            raise ValueError(f"parallel: {self.parallel!r}, expected one of {', '.join(PARALLEL)}")
        if not 0 < self.importance_cap < math.inf:
            raise ValueError(f"importance_cap: {self.importance_cap}, expected a number above 0")

    @property
    def objective_terms(self) -> dict[str, float]:
        """``objective`` as a table."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else dict(self.objective)


class Swap(_Section, frozen=True, kw_only=True):
    """Gate, swap, watch."""

    poll_s: float = 1.0
    #: Held-out traces that the gate replays (the most recent ones), and the fewest it decides on.
    gate_traces: int = 64
    gate_min_traces: int = 8
    #: Standard error of the predicted accept length, as a share of it, above which the gate waits for more traces, as
    #: long as it has fewer than ``gate_traces``.
    gate_max_error: float = 0.05
    #: Seconds after which a trace is no evidence of today's traffic any more.
    gate_max_age_s: float = 3600.0
    bootstrap: int = 1000
    #: Two-sided confidence of the bootstrap interval.
    confidence: float = 0.95
    #: Verify rounds and requests observed after a swap before it is kept.  Rounds of one request are alike: it is over
    #: n requests that an accept length is known to some 20 % / sqrt(n).  Who fails by far goes after a quarter of them.
    watch_rounds: int = 1000
    watch_requests: int = 50
    #: Times as much that is observed, until the next swap, while no better candidate is at hand.
    watch_longer: float = 3.0
    #: Roll back when the observed accept length falls below this share both of the predicted one and of what the
    #: previous drafter showed (traffic that grows harder fails the prediction, but is no reason to go back).
    rollback_below: float = 0.9
    #: Seconds after which the watch decides on what it has; five times ``watch_rounds`` of other traffic end it, too.
    watch_timeout_s: float = 120.0
    folder: str = "runs/live/swap"


class Registry(_Section, frozen=True, kw_only=True):
    """Where versions live."""

    #: ``http://host:port`` of an MLflow server, or ``memory:`` (tests).
    url: str = "http://127.0.0.1:5000"
    model: str = "drafter"
    #: Folder of the sqlite store and artifacts of the server that ``livedraft up`` starts.
    folder: str = "runs/live/mlflow"
    #: Whether ``livedraft up`` starts the server.
    start: bool = True


class Settings(_Section, frozen=True, kw_only=True):
    """Everything."""

    engine: Engine = Engine()
    sglang: Sglang = Sglang()
    gateway: Gateway = Gateway()
    traces: Traces = Traces()
    kafka: Kafka = Kafka()
    relay: Relay = Relay()
    metrics: Metrics = Metrics()
    trainer: Trainer = Trainer()
    swap: Swap = Swap()
    registry: Registry = Registry()


def load(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from a TOML file (defaults without one) and ``LIVEDRAFT_SECTION__KEY`` variables.

    Raises SettingsError naming the file or variable, the key and what was expected.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = msgspec.toml.decode(path.read_bytes())
        except (OSError, msgspec.DecodeError) as error:
            raise SettingsError(f"{path}: {error}") from error
    for name, value in (os.environ if environ is None else environ).items():
        if name.startswith("LIVEDRAFT_") and "__" in name:
            section, _, key = name.removeprefix("LIVEDRAFT_").lower().partition("__")
            raw.setdefault(section, {})[key] = _read_variable(name, value, section, key)
    try:
        # Not strict: the environment has only strings.
        return msgspec.convert(raw, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(f"{path or 'environment'}: {error}") from error


def _read_variable(name: str, value: str, section: str, key: str) -> Any:
    """The value of ``section.key``, of the type it has there.  Raises SettingsError naming the variable."""
    sections = _types(Settings)
    known = _types(sections[section]) if section in sections else {}
    if key not in known:
        raise SettingsError(f"{name}: there is no setting {section}.{key}")
    listed = get_origin(known[key]) is tuple
    if listed and value.lstrip().startswith("["):
        raise SettingsError(f"{name}: {value!r}, expected entries separated by commas, without brackets")
    entries = [entry.strip() for entry in value.split(",")] if value.strip() else []
    try:
        return msgspec.convert(entries if listed else value, known[key], strict=False)
    except msgspec.ValidationError as error:
        expected = ", expected entries separated by commas" if listed else ""
        raise SettingsError(f"{name}: {value!r}{expected}: {error}") from error


def _types(struct: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(struct)}
