"""Flower's own SecAgg+ functions, run in an environment of their own for `benchmarks.secagg`.

    flower_secagg.py DEGREE THRESHOLD DIMENSION ALIVE

The peer's client module and the functions that its server's workflow calls, in its order and on its types, without
its transport. `ALIVE`: of a device's neighbours. Reads commands, a line each, and answers with a line when done:

    device      all four stages of one device; its update is quantized beforehand
    add         the server takes in one masked vector
    survivor    the server recovers one survivor's seed and removes its mask
    lost        the server recovers one lost device's key and removes its masks
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np

CLIENT: Any = import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")
SERVER: Any = import_module("flwr.server.workflow.secure_aggregation.secaggplus_workflow")
Key: Any = import_module("flwr.common.secure_aggregation.secaggplus_constants").Key
MODULUS = 1 << 32
LEVELS = 1 << 22
ME = 0


class Flower:
    """One device with its neighbours, and a server's sum."""

    def __init__(self, degree: int, threshold: int, dimension: int, alive: int) -> None:
        self.degree, self.alive = degree, alive
        self.config = {
            Key.SAMPLE_NUMBER: degree + 1,
            Key.SHARE_NUMBER: degree + 1,
            Key.THRESHOLD: threshold,
            Key.CLIPPING_RANGE: 8.0,
            Key.TARGET_RANGE: LEVELS,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: 1.0,
        }
        members = [CLIENT.SecAggPlusState() for _ in range(degree + 1)]
        keys = [CLIENT._setup(member, self.config) for member in members]
        self.public = {
            str(nid): (pair[Key.PUBLIC_KEY_1], pair[Key.PUBLIC_KEY_2])
            for nid, pair in enumerate(keys)
        }
        self.state, self.neighbours = members[ME], members[1:]
        self.seed_shares = CLIENT.create_shares(bytes(32), threshold, degree + 1)
        self.key_shares = CLIENT.create_shares(self.state.sk1, threshold, degree + 1)
        self.ciphertexts = [self.ciphertext(nid) for nid in range(1, degree + 1)]
        # Both sides get an update that is encoded already: only the protocol is compared.
        update = np.random.default_rng(0).integers(0, LEVELS, dimension).astype(np.int32)
        CLIENT.parameters_to_ndarrays = lambda parameters: parameters
        CLIENT.parameters_multiply = lambda parameters, factor: parameters
        CLIENT.quantize = lambda parameters, clip, levels: parameters
        self.update = [update]
        self.upload = self.device()
        self.sum = [SERVER.bytes_to_ndarray(part) for part in self.upload]
        self.shapes = SERVER.get_parameters_shape(self.sum)

    def ciphertext(self, sender: int) -> bytes:
        """What a neighbour would send: shares as large as its own."""
        secret = CLIENT.bytes_to_private_key(self.neighbours[sender - 1].sk2)
        key = CLIENT.generate_shared_key(secret, CLIENT.bytes_to_public_key(self.state.pk2))
        shares = (self.seed_shares[sender], self.key_shares[sender])
        text = CLIENT.share_keys_plaintext_concat(sender, ME, *shares)
        sealed: bytes = CLIENT.encrypt(key, text)
        return sealed

    def device(self) -> list[bytes]:
        everyone = list(range(1, self.degree + 1))
        CLIENT._setup(CLIENT.SecAggPlusState(), self.config)
        self.state.nid = ME
        CLIENT._share_keys(self.state, self.public)
        received = {Key.CIPHERTEXT_LIST: self.ciphertexts, Key.SOURCE_LIST: everyone}
        answer = CLIENT._collect_masked_vectors(self.state, received, 1, self.update)
        lists = (everyone[: self.alive], everyone[self.alive :])
        active, dead = [ME, *lists[0]], lists[1]
        CLIENT._unmask(self.state, {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead})
        vectors: list[bytes] = answer[Key.MASKED_PARAMETERS]
        return vectors

    def add(self) -> None:
        SERVER.parameters_addition(self.sum, [SERVER.bytes_to_ndarray(x) for x in self.upload])

    def survivor(self) -> None:
        # Its server combines every share that came, not only as many as are needed.
        seed = SERVER.combine_shares(self.seed_shares[: self.alive + 1])
        mask = SERVER.pseudo_rand_gen(seed, MODULUS, self.shapes)
        SERVER.parameters_subtraction(self.sum, mask)

    def lost(self) -> None:
        secret = SERVER.combine_shares(self.key_shares[: self.alive])
        for neighbour in range(1, self.degree + 1):
            public = SERVER.bytes_to_public_key(self.public[str(neighbour)][0])
            key = SERVER.generate_shared_key(SERVER.bytes_to_private_key(secret), public)
            mask = SERVER.pseudo_rand_gen(key, MODULUS, self.shapes)
            SERVER.parameters_subtraction(self.sum, mask)


def main() -> None:
    flower = Flower(*map(int, sys.argv[1:]))
    commands = {name: getattr(flower, name) for name in ("device", "add", "survivor", "lost")}
    print(sum(map(len, flower.upload)), flush=True)
    for line in sys.stdin:
        commands[line.strip()]()
        print("done", flush=True)


if __name__ == "__main__":
    main()
