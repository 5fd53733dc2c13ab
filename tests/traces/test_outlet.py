"""What a broker may do to an outlet, by a broker that does it on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from livedraft.contracts.errors import StreamUnavailable, TraceError
from livedraft.traces.outlet import BrokerOutlet
from livedraft.traces.parcel import Parcel
from livedraft.traces.spill import Spill

SIZE = 100
WINDOW = 3 * SIZE


def parcel(number: int) -> Parcel:
    return Parcel(key=b"k", headers=(), messages=((b"%d " % number).ljust(SIZE, b"x"),), at=time.time())


class FakeBroker:
    """Takes parcels when told to; a client whose delivery failed once takes no more, as one that lost its broker."""

    def __init__(self) -> None:
        self.up = True
        self.prompt = False
        self.arrived: list[int] = []
        self.client: FakeClient | None = None
        self.most_held = 0

    def connect(self) -> FakeClient:
        if not self.up:
            raise StreamUnavailable("no broker")
        self.client = FakeClient(self)
        return self.client


class FakeClient:
    def __init__(self, broker: FakeBroker) -> None:
        self._broker = broker
        self._lock = threading.Lock()
        self._held: list[tuple[int, Callable[[Exception | None], None]]] = []
        self._closed = False

    def send(self, parcel: Parcel, done: Callable[[Exception | None], None]) -> None:
        with self._lock:
            if self._closed or not self._broker.up:
                raise StreamUnavailable("gone")
            self._held.append((int(parcel.messages[0].split()[0]), done))
            self._broker.most_held = max(self._broker.most_held, len(self._held))
        if self._broker.prompt:
            self.acknowledge(1)

    def acknowledge(self, count: int) -> None:
        with self._lock:
            done, self._held = self._held[:count], self._held[count:]
            self._broker.arrived += [number for number, _ in done]
        for _, tell in done:
            tell(None)

    def fail(self, arrived: int, error: Exception | None = None) -> None:
        """Every delivery fails, although the broker took the first ``arrived``."""
        with self._lock:
            held, self._held, self._closed = self._held, [], True
            self._broker.arrived += [number for number, _ in held[:arrived]]
        for _, tell in held:
            tell(error or StreamUnavailable("timed out"))

    def close(self, timeout: float) -> None:
        self.fail(0)


class Fates:
    """What became of each parcel; told once."""

    def __init__(self) -> None:
        self.of: dict[int, str] = {}

    def settle(self, number: int) -> Callable[[str], None]:
        def settle(fate: str) -> None:
            assert number not in self.of, "settled twice"
            self.of[number] = fate

        return settle


def eventually(condition: Callable[[], bool], act: Callable[[], None] = lambda: None) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        act()
        time.sleep(0.001)


class OutletMachine(RuleBasedStateMachine):
    """Whatever happens, nothing is lost that was not said to be, and first arrivals are in order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.broker, self.fates, self.count = FakeBroker(), Fates(), 0
        self.now = 0.0
        self.open()

    def open(self) -> None:
        self.outlet = BrokerOutlet(
            self.broker.connect,
            window_bytes=WINDOW,
            spill=Spill(Path(self.folder.name), max_bytes=20_000),
            retry_s=0.0,
            clock=self.clock,
        )

    def clock(self) -> float:
        self.now += 0.6  # two looks at it are a stall
        return self.now

    @rule(parcels=st.integers(1, 5))
    def put(self, parcels: int) -> None:
        for _ in range(parcels):
            self.outlet.put(parcel(self.count), self.fates.settle(self.count))
            self.count += 1

    @rule(count=st.integers(1, 4))
    def acknowledge(self, count: int) -> None:
        if self.broker.client:
            self.broker.client.acknowledge(count)

    @rule(arrived=st.integers(0, 3))
    def fail(self, arrived: int) -> None:
        if self.broker.client:
            self.broker.client.fail(arrived)

    @rule(up=st.booleans())
    def reachable(self, up: bool) -> None:
        self.broker.up = up

    @rule()
    def pause(self) -> None:
        self.outlet.pause()

    @rule()
    def start_again(self) -> None:
        self.outlet.hurry(self.now)
        self.outlet.close()
        assert set(self.fates.of) == set(range(self.count)), "closed, and not all are settled"
        self.open()

    @invariant()
    def memory_is_bounded(self) -> None:
        assert self.outlet.in_flight_bytes <= WINDOW
        assert self.broker.most_held <= WINDOW // SIZE

    def teardown(self) -> None:
        self.broker.up = self.broker.prompt = True
        if self.broker.client:
            self.broker.client.fail(0)
        eventually(lambda: not self.outlet.lag and not self.outlet.in_flight_bytes, self.outlet.pause)
        self.outlet.hurry(self.now)
        self.outlet.close()
        assert set(self.fates.of) == set(range(self.count))
        kept = {number for number, fate in self.fates.of.items() if fate in ("written", "spilled")}
        assert kept <= set(self.broker.arrived)
        firsts = list(dict.fromkeys(self.broker.arrived))
        assert firsts == sorted(firsts)
        self.folder.cleanup()


OutletMachine.TestCase.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestOutlet = OutletMachine.TestCase


def connected(broker: FakeBroker, outlet: BrokerOutlet) -> None:
    eventually(lambda: broker.client is not None, outlet.pause)


def test_what_is_acknowledged_is_written_and_frees_its_memory() -> None:
    broker, fates = FakeBroker(), Fates()
    outlet = BrokerOutlet(broker.connect, window_bytes=WINDOW)
    for n in range(3):
        outlet.put(parcel(n), fates.settle(n))
    assert (outlet.in_flight_bytes, fates.of) == (WINDOW, {})
    assert 0 <= outlet.age_s < 60
    assert broker.client
    broker.client.acknowledge(2)
    outlet.pause()
    assert (outlet.in_flight_bytes, fates.of) == (SIZE, {0: "written", 1: "written"})
    outlet.hurry(0.0)
    outlet.close()
    assert fates.of[2] == "closed"
    assert outlet.age_s == 0


def test_without_a_spill_what_is_not_acknowledged_in_time_is_dropped_and_sending_goes_on() -> None:
    broker, fates = FakeBroker(), Fates()
    outlet = BrokerOutlet(broker.connect, window_bytes=WINDOW, retry_s=0.0)
    outlet.put(parcel(0), fates.settle(0))
    assert broker.client
    broker.client.fail(0)
    broker.prompt = True
    outlet.put(parcel(1), fates.settle(1))  # the client is closed: dropped, and another one is made
    outlet.put(parcel(2), fates.settle(2))
    outlet.pause()
    assert fates.of == {0: "broker", 1: "broker", 2: "written"}
    outlet.close()


def test_a_message_that_is_refused_for_good_does_not_hold_up_the_others(tmp_path: Path) -> None:
    broker, fates = FakeBroker(), Fates()
    spill = Spill(tmp_path, max_bytes=1 << 20)
    spill.append(parcel(0))
    spill.append(parcel(1))
    outlet = BrokerOutlet(broker.connect, window_bytes=SIZE, spill=spill, retry_s=0.0)
    connected(broker, outlet)
    outlet.pause()
    assert broker.client
    broker.client.fail(0, TraceError("too large"))
    broker.prompt = True
    eventually(lambda: outlet.lag == 0, outlet.pause)
    assert broker.arrived == [1]
    assert outlet.backfilled == 1
    outlet.put(parcel(2), fates.settle(2))
    outlet.close()
    assert fates.of == {2: "written"}


def test_a_full_spill_drops_the_newest(tmp_path: Path) -> None:
    broker, fates = FakeBroker(), Fates()
    broker.up = False
    outlet = BrokerOutlet(
        broker.connect, window_bytes=WINDOW, spill=Spill(tmp_path, max_bytes=1000), clock=iter(range(10_000)).__next__
    )
    for n in range(12):
        outlet.put(parcel(n), fates.settle(n))
    kept = [n for n, fate in fates.of.items() if fate == "spilled"]
    assert kept == list(range(len(kept)))
    assert 3 < len(kept) < 10
    assert {fates.of[n] for n in range(len(kept), 12)} == {"spill"}
    assert outlet.lag == len(kept)
    outlet.hurry(0.0)
    outlet.close()


def test_a_broker_that_comes_late_gets_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broker, fates = FakeBroker(), Fates()
    broker.up, broker.prompt = False, True
    outlet = BrokerOutlet(
        broker.connect, spill=Spill(tmp_path, max_bytes=1 << 20), retry_s=0.0, clock=iter(range(100_000)).__next__
    )
    for n in range(5):
        outlet.put(parcel(n), fates.settle(n))
    assert set(fates.of.values()) == {"spilled"}
    broker.up = True
    eventually(lambda: outlet.lag == 0, outlet.pause)
    assert broker.arrived == [0, 1, 2, 3, 4]
    assert outlet.backfilled == 5
    assert "the broker is away" in caplog.text
    assert "the spill is empty" in caplog.text
    outlet.close()
