"""What secure aggregation costs: time of a device, time and memory of the server, upload.

Real devices and a real server run the whole protocol in one process. Devices are lost after they shared their keys,
where a loss costs the server most, and the opened sum must be the plain integer sum. Floors, made in the same run:

    masks         as many AES-128-CTR keystreams, each with a key of its own, expanded and added to one vector
    + agreements  and the X25519 agreements: two per neighbour on a device, one per mask of a lost device on the server
    + checks      and the Ed25519 checks that the protocol asks for; on the server also to hash and add each vector

The peer is Flower's SecAgg+ with the same n, k, t and d. Its device is measured whole; of its server, the addition of
one vector, one survivor and one lost device are measured and multiplied by their numbers ("extrapolated").
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from benchmarks.harness import Options, Row, alternate, parse_options, peer_python, report, rows
from benchmarks.server_round import peak, reset_peak
from homespun.protocol.frame import masked_frame_size
from homespun.secagg import device
from homespun.secagg.device import Demands, Work
from homespun.secagg.graph import Adversary, Shape, choose_shape
from homespun.secagg.masks import apply_masks, key_agreement
from homespun.secagg.messages import MaskedInput, Terms
from homespun.secagg.server import Group, Sums
from homespun.secagg.transcript import check_signature, sha256
from homespun.tensors.packing import word

FLOWER = "flwr==1.41.0"
BITS = 16
NUM_AUX = 8
CORRUPT = 0.05
CORES = os.cpu_count() or 1
SAMPLES = 5  # devices whose time is taken
IN_A_TURN = 10  # devices whose floor is measured at once, between devices
PIECE = 1 << 18  # bytes
FEWEST = 1 / 10  # drop-outs that every graph bears


@dataclass(frozen=True)
class Case:
    """`lost`: share of the devices that leave after they shared their keys."""

    num_devices: int
    dimension: int
    lost: float = 0.0

    @property
    def num_lost(self) -> int:
        return round(self.lost * self.num_devices)

    @property
    def shape(self) -> Shape:
        bearable = max(FEWEST, self.lost)
        return choose_shape(self.num_devices, CORRUPT, bearable, Adversary.SEMI_MALICIOUS)

    @property
    def terms(self) -> Terms:
        return Terms(
            task="benchmark",
            round_number=1,
            attempt=1,
            checkpoint_hash="c" * 64,
            plan_hash="a" * 64,
            bits=BITS,
            dimension=self.dimension,
            num_aux=NUM_AUX,
            schema="benchmark",
            clip=1.0,
            n_min=3,
            n_max=self.num_devices,
            corrupt_fraction=CORRUPT,
            drop_out_fraction=max(FEWEST, self.lost),
        )

    def __str__(self) -> str:
        shape = self.shape
        size = f"n={self.num_devices} d={self.dimension:.0e}"
        return f"{size} k={shape.degree} t={shape.threshold} lost={self.lost:.0%}"


# --- one group ----------------------------------------------------------------------------------------


class Member:
    """A device in this process. With `keep`, its steps can be taken again, to time them."""

    def __init__(self, keep: bool) -> None:
        self.signer = Ed25519PrivateKey.generate()
        self.identity = self.signer.public_key().public_bytes_raw()
        self.keep = keep
        self.state: tuple[Any, ...] = ()
        self.steps: list[Callable[[], object]] = []
        self.control_bytes = 0  # sent, but for the masked vectors

    def take(self, step: Callable[..., tuple[Any, Any]], *arguments: Any) -> Any:
        """The device's answer; the functions are pure, so a step can be repeated from the state before it."""
        before = self.state
        if self.keep:
            self.steps.append(lambda: step(*before, *arguments))
        state, answer = step(*before, *arguments)
        self.state = (state,)
        if not isinstance(answer, MaskedInput):
            self.control_bytes += len(msgspec.json.encode(answer))
        return answer

    def take_all_again(self) -> None:
        for step in self.steps:
            step()


@dataclass
class Session:
    """A group with every share it needs. `taking_in_s`: the server's time until here, and its floor."""

    case: Case
    group: Group
    expected: Sums
    samples: list[Member] = field(default_factory=list)
    taking_in_s: float = 0.0
    floor_s: float = 0.0

    def serve(self, call: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        self.taking_in_s += time.perf_counter() - began
        return result

    def open(self, *parallel: Any) -> None:
        """Opens the sum and checks it."""
        for opened, expected in zip(self.group.open_sum(*parallel), self.expected, strict=True):
            assert np.array_equal(opened, expected), "the opened sum is another one"

    def num_masks(self) -> tuple[int, int]:
        """Masks that opening takes away, and how many of them cost a key agreement."""
        state, neighbours = self.group.state, self.group.graph.neighbours
        gone = [owner for owner in state.shared if owner not in state.masked]
        pairs = sum(other in state.masked for owner in gone for other in neighbours(owner))
        return len(state.masked) + pairs, pairs


def run_group(case: Case, group: Group, num_samples: int = SAMPLES) -> Session:
    """Everything but opening, with real devices; the first ones are lost, the next ones are samples."""
    terms, num_lost = case.terms, case.num_lost
    first_other = num_lost + num_samples
    members = [Member(num_lost <= number < first_other) for number in range(case.num_devices)]
    total = np.zeros(case.dimension, word(BITS)), np.zeros(NUM_AUX, "<u8")
    session = Session(case, group, total, members[num_lost:first_other])
    serve = session.serve
    names = "task round_number attempt plan_hash bits dimension num_aux schema clip n_max".split()
    work = Work(ancestry=(terms.checkpoint_hash,), **{name: getattr(terms, name) for name in names})
    demands = Demands(3, CORRUPT)

    for one in members:
        first = (terms, work, demands, one.identity, one.signer, os.urandom)
        serve(group.advertise_keys, one.take(device.advertise_keys, *first))
    serve(group.close_advertise_keys)
    places = [serve(group.index_of, one.identity) for one in members]
    for index, one in zip(places, members, strict=True):
        request = serve(group.share_keys_request, index)
        serve(group.share_keys, index, one.take(device.share_keys, request, os.urandom))
    serve(group.close_share_keys)

    rng = np.random.default_rng(0)
    survivors = list(zip(places, members, strict=True))[num_lost:]
    turns = {one for _, one in survivors[::IN_A_TURN]}
    for index, one in survivors:
        main = rng.integers(0, 2**BITS, case.dimension, word(BITS))
        aux = rng.integers(0, 2**63, NUM_AUX, "<u8")
        for part, mine in zip(total, (main, aux), strict=True):
            part += mine
        request = serve(group.mask_input_request, index)
        answer = one.take(device.mask_input, request, main, aux, one.signer)
        serve(group.mask_input, index, answer)
        if one in turns:
            began = time.perf_counter()
            reading(case.dimension, IN_A_TURN)
            checks(3 * IN_A_TURN)  # of keys, of the vectors, of the survivor set
            session.floor_s += time.perf_counter() - began
    serve(group.close_mask_input)
    for index, one in survivors:
        request = serve(group.agree_request)
        serve(group.agree, index, one.take(device.agree, request, one.signer))
    serve(group.close_agree)
    for index, one in survivors:
        request = serve(group.unmask_request, index)
        serve(group.unmask, index, one.take(device.unmask, request))
    return session


# --- floors -------------------------------------------------------------------------------------------


def masks(dimension: int, number: int) -> None:
    """Expands `number` keystreams and adds them up in pieces that stay in the cache: no mask can cost less."""
    vector, zeros = np.zeros(PIECE, np.uint8), memoryview(bytes(PIECE))
    keystream = np.empty(PIECE + 16, np.uint8)
    left = np.full(-(-dimension * word(BITS).itemsize // PIECE), PIECE)
    left[-1] = dimension * word(BITS).itemsize - left[:-1].sum()
    pieces = [
        (zeros[:size], keystream[:size].view(word(BITS)), vector[:size].view(word(BITS)))
        for size in left.tolist()
    ]
    for counter in range(number):
        cipher = Cipher(algorithms.AES(bytes(16)), modes.CTR(counter.to_bytes(16, "big")))
        update_into: Any = cipher.encryptor().update_into
        for source, mask, words in pieces:
            update_into(source, keystream)
            np.add(words, mask, out=words)


def agreements(number: int) -> None:
    secret = X25519PrivateKey.generate()
    public = X25519PrivateKey.generate().public_key().public_bytes_raw()
    for _ in range(number):
        key_agreement(secret, public, 0)


def checks(number: int) -> None:
    key, text = Ed25519PrivateKey.generate(), bytes(500)
    identity, signature = key.public_key().public_bytes_raw(), key.sign(text)
    for _ in range(number):
        check_signature(identity, signature, text, "a floor")


def reading(dimension: int, number: int) -> None:
    """Hashes and adds `number` vectors."""
    vector = np.zeros(dimension, word(BITS))
    data = bytes(vector.nbytes)
    for _ in range(number):
        sha256(data)
        np.add(vector, np.frombuffer(data, vector.dtype), out=vector)


# --- the peer -----------------------------------------------------------------------------------------


class Flower:
    """A process with Flower's functions: `flower(command)` does one thing there and waits for it."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._stdin, self._stdout = child.stdin, child.stdout
        self.upload_bytes = int(self._stdout.readline())

    def __call__(self, command: str) -> None:
        print(command, file=self._stdin, flush=True)
        assert self._stdout.readline() == "done\n", "Flower's process ended"


@contextmanager
def flower_of(case: Case) -> Iterator[Flower]:
    shape = case.shape
    alive = round(shape.degree * (1 - case.lost))
    script = Path(__file__).parent / "peers" / "flower_secagg.py"
    sizes = (shape.degree, shape.threshold, case.dimension, alive)
    child = subprocess.Popen(
        [peer_python("flower", [FLOWER]), script, *map(str, sizes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
    )
    try:
        yield Flower(child)
    finally:
        child.communicate()  # it ends with its input


# --- measurements -------------------------------------------------------------------------------------


def measure_masks(dimension: int, repeats: int) -> list[Row]:
    """The expansion alone: 64 masks whose keys are known."""
    main, aux = np.zeros(dimension, word(BITS)), np.zeros(NUM_AUX, "<u8")
    pairs = [(os.urandom(32), number % 2 == 0) for number in range(64)]
    timings = alternate(
        {
            "homespun": lambda: apply_masks(main, aux, pairs),
            "masks": lambda: masks(dimension, len(pairs)),
        },
        repeats=repeats,
    )
    return rows(f"d={dimension:.0e}, {len(pairs)} masks", timings, floor="masks")


def measure_device(session: Session, flower: Flower, repeats: int) -> list[Row]:
    """All five steps of one device and each alone, the devices taking turns."""
    case, shape = session.case, session.case.shape
    k, t, d = shape.degree, shape.threshold, case.dimension
    turns = itertools.cycle(session.samples)
    names = ("advertise keys", "share keys", "mask input", "agree", "unmask")

    def step(number: int) -> Callable[[], None]:
        def take_again() -> None:
            next(turns).steps[number]()

        return take_again

    timings = alternate(
        {
            "homespun": lambda: next(turns).take_all_again(),
            **{name: step(number) for number, name in enumerate(names)},
            "masks": lambda: masks(d, k + 1),
            "agreements": lambda: agreements(k),
            "checks": lambda: checks(k + 1 + t),
            "Flower": lambda: flower("device"),
        },
        repeats=repeats,
    )
    once, twice = [added(timings["masks"], timings["agreements"], by) for by in (1, 2)]
    whole = {
        "homespun": timings["homespun"],
        "masks": timings["masks"],
        "+ agreements": twice,
        "+ checks": added(twice, timings["checks"]),
        "Flower": timings["Flower"],
    }
    masking = {"homespun": timings["mask input"], "masks": timings["masks"], "+ agreements": once}
    return [
        *rows(f"{case}, device", whole, floor="+ agreements", peer="Flower"),
        *rows(f"{case}, device's masking step", masking, floor="+ agreements"),
        *rows(f"{case}, device by step", {name: timings[name] for name in names}),
    ]


def measure_server(session: Session, flower: Flower, repeats: int) -> list[Row]:
    """Taking everything in, opening the sum, and both."""
    case, d = session.case, session.case.dimension
    num_masks, num_agreements = session.num_masks()
    alive = case.num_devices - case.num_lost
    several = f"homespun, {CORES} "
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(CORES, mp_context=context) as processes,
        ThreadPoolExecutor(CORES) as threads,
    ):
        timings = alternate(
            {
                "homespun": session.open,
                several + "processes": lambda: session.open(processes.map, CORES),
                several + "threads": lambda: session.open(threads.map, CORES),
                "masks": lambda: masks(d, num_masks),
                "agreements": lambda: agreements(num_agreements),
                "Flower adds": lambda: flower("add"),
                "Flower opens": lambda: flower("survivor"),
                "Flower recovers": lambda: flower("lost") if case.num_lost else None,
            },
            repeats=repeats,
        )
    taking_in = {"homespun": [session.taking_in_s], "reading + checks": [session.floor_s]}
    opening = {name: timings[name] for name in timings if name.startswith("homespun")}
    opening["masks"] = timings["masks"]
    opening["+ agreements"] = added(timings["masks"], timings["agreements"])
    in_all = {
        name: [session.taking_in_s + seconds for seconds in timings[name]]
        for name in timings
        if name.startswith("homespun")
    }
    in_all["+ agreements"] = opening["+ agreements"]
    in_all["+ reading + checks"] = [session.floor_s + s for s in opening["+ agreements"]]
    parts = ((alive, "Flower adds"), (alive, "Flower opens"), (case.num_lost, "Flower recovers"))
    in_all["Flower, extrapolated"] = [
        sum(seconds)
        for seconds in zip(*([n * s for s in timings[name]] for n, name in parts), strict=True)
    ]
    masked = f"{num_masks} masks, {num_agreements} agreements"
    return [
        *rows(f"{case}, server taking in", taking_in, floor="reading + checks"),
        *rows(f"{case}, server opening ({masked})", opening, floor="+ agreements"),
        *rows(
            f"{case}, server in all",
            in_all,
            floor="+ reading + checks",
            peer="Flower, extrapolated",
        ),
    ]


def added(first: Sequence[float], second: Sequence[float], times: int = 1) -> list[float]:
    return [a + times * b for a, b in zip(first, second, strict=True)]


def upload(session: Session, flower: Flower) -> list[Row]:
    """Bytes that one device sends for each entry of its vector, everything counted."""
    d, one = session.case.dimension, session.samples[0]
    sizes = {
        f"homespun, {bits} bits": one.control_bytes + masked_frame_size(bits, NUM_AUX, d)
        for bits in (BITS, 14)
    }
    sizes["Flower"] = flower.upload_bytes
    entries = {side: [size / d] for side, size in sizes.items()}
    return [
        *rows(f"{session.case}, upload", entries, peer="Flower", unit="B/entry"),
        *rows(
            f"{session.case}, upload without vectors", {"homespun": [one.control_bytes]}, unit="B"
        ),
    ]


class Server(BaseManager):
    """A process that holds one group and does what its proxy here is told."""


Server.register("Group", Group)
Server.register("getpid", os.getpid)


def measure_memory(num_devices: int, dimension: int) -> list[Row]:
    """The largest memory of a server process beyond what it held before the group came."""
    case = Case(num_devices, dimension)
    with Server(ctx=get_context("spawn")) as manager:
        server: Any = manager
        process = psutil.Process(int(str(server.getpid())))
        before = reset_peak(process)
        run_group(case, server.Group(case.terms), num_samples=0).open()
        sides = {
            "homespun": [peak(process) - before],
            "one sum": [2.0 * dimension],
            "sealed shares": [80.0 * num_devices * case.shape.degree],
        }
    return rows(f"{case}, server memory", sides, floor="one sum", unit="B")


def measure(case: Case, repeats: int) -> list[Row]:
    session = run_group(case, Group(case.terms))
    with flower_of(case) as flower:
        return [
            *measure_device(session, flower, 3 * repeats),
            *measure_server(session, flower, repeats),
            *upload(session, flower),
        ]


def run(options: Options) -> list[Row]:
    sizes = [(100, 10**5)] if options.quick else [(100, 10**6), (1000, 10**5), (1000, 10**6)]
    results = measure_masks(10**6, 5 if options.quick else 25)
    for (num_devices, dimension), lost in itertools.product(sizes, (0.0, 0.1, 0.2)):
        results += measure(Case(num_devices, dimension, lost), 3)
    for dimension in (10**4, 10**5) if options.quick else (10**4, 10**6):
        for num_devices in (10, 100) if options.quick else (10, 100, 1000):
            results += measure_memory(num_devices, dimension)
    return results


if __name__ == "__main__":
    options = parse_options(__doc__)
    report(run(options), options)
