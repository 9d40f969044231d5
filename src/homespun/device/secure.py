"""The device as a member of a group: what the server asks, checked and answered by `secagg.device`.

All that a member knows is in one file, replaced durably before an answer leaves. So a device that is killed at
any point gives the same answer again, to the same request only. The file holds secrets: whoever has all of it, and
what the device sent, can take the masks off its vectors. Hence it is sealed, and goes with the session's files.
"""

from __future__ import annotations

from dataclasses import dataclass
from secrets import token_bytes

import msgspec

from homespun.device.home import storage, write_atomically
from homespun.device.identity import Identity
from homespun.device.sealing import Seal
from homespun.device.work import Work
from homespun.errors import StorageFailure, WrongStep, WrongTerms
from homespun.learning.contribution import ContributionCodec
from homespun.protocol import messages
from homespun.protocol.frame import decode_contribution, encode_masked_input
from homespun.protocol.messages import Assigned, Carried, checkpoints_hash
from homespun.secagg import device as secagg
from homespun.secagg.messages import (
    Agree,
    AgreeRequest,
    MaskInputRequest,
    ShareKeys,
    ShareKeysRequest,
    Terms,
    Unmask,
    UnmaskRequest,
)
from homespun.types import Hash

Request = Terms | Carried | ShareKeysRequest | MaskInputRequest | AgreeRequest | UnmaskRequest
MASK_INPUT = "mask-input"


@dataclass(frozen=True)
class Member:
    """`task`: name of the task; `digest` and `ancestry`: as journalled; `min_group`: of the device's policy."""

    work: Work
    task: str
    digest: Hash | None
    ancestry: tuple[Hash, ...]
    min_group: int
    identity: Identity
    seal: Seal

    def answer(self, asked: Request) -> tuple[str, bytes]:
        """The step's name and the answer's bytes, once what they rest on is durable.

        Raises `SecureAggregationError` and its kinds when the device must not go on, `StorageFailure`,
        `Conflict` when the report is not the one that was journalled, and what `Work.verified` raises.
        """
        state = self._load()
        if isinstance(asked, Terms | Carried):
            return self._join(asked if isinstance(asked, Terms) else asked.terms, state)
        if state is None:
            raise WrongStep("the server asks about a group that this device does not know")
        new: secagg.DeviceState
        answer: ShareKeys | Agree | Unmask
        match asked:
            case ShareKeysRequest():
                step, (new, answer) = "share-keys", secagg.share_keys(state, asked, token_bytes)
            case MaskInputRequest():
                return self._mask_input(asked, state)
            case AgreeRequest():
                step, (new, answer) = "agree", secagg.agree(state, asked, self.identity)
            case UnmaskRequest():
                step, (new, answer) = "unmask", secagg.unmask(state, asked)
        self._save(new)
        return step, messages.encode(answer)

    def _join(self, terms: Terms, before: secagg.DeviceState | None) -> tuple[str, bytes]:
        """Fresh keys, whatever there was before: the server says that it came to nothing."""
        if isinstance(before, secagg.Answered):
            # The server can open that group, whatever it says. The same vectors in a second one would give it
            # the difference of two sums: of those whose members are all the same but one, what that one sent.
            raise WrongStep("another group after this device helped to open its first")
        assigned = self.work.assigned
        work = group_work(self.task, assigned, self.work.codec(), self.ancestry)
        demands = secagg.Demands(
            smallest_group=self.min_group, max_staleness=assigned.max_staleness
        )
        identity = self.identity
        state, keys = secagg.advertise_keys(
            terms, work, demands, identity.public_key, identity, token_bytes
        )
        self._save(state)
        return "advertise-keys", messages.encode(keys)

    def _mask_input(self, asked: MaskInputRequest, state: secagg.DeviceState) -> tuple[str, bytes]:
        report = decode_contribution(self.work.report(self.digest))
        new, answer = secagg.mask_input(state, asked, report.main, report.aux, self.identity)
        self._save(new)
        return MASK_INPUT, encode_masked_input(answer, state.terms.bits)

    # --- the file -----------------------------------------------------------------------------------------

    def _load(self) -> secagg.DeviceState | None:
        """None before the first group, and for a file that does not open."""
        path = self.work.group_file
        with storage(path):
            sealed = path.read_bytes() if path.exists() else b""
        try:
            return secagg.load(self.seal.unseal(sealed, self._bound, path)) if sealed else None
        except (StorageFailure, msgspec.MsgspecError):
            return None

    def _save(self, state: secagg.DeviceState) -> None:
        sealed = self.seal.seal(secagg.save(state), self._bound)
        write_atomically(self.work.group_file, sealed)

    @property
    def _bound(self) -> bytes:
        """The state of another session does not open."""
        return f"homespun-group-v1/{self.work.directory.name}".encode()


def carry(assigned: Assigned, known: tuple[Hash, ...], carried: Carried) -> Assigned:
    """The assignment as it is in the round that it was carried into. `known`: the ancestry so far.

    Raises `WrongTerms` unless the new ancestry goes on from the known one, one checkpoint a round, and is no longer
    than the device agreed to when it took the offer.
    """
    terms, ancestry = carried.terms, carried.ancestry
    known = known or assigned.checkpoints
    num_rounds = terms.round_number - assigned.round_number
    follows = ancestry[: len(known)] == known and ancestry[-1] == terms.checkpoint_hash
    if not follows or len(ancestry) != len(known) + num_rounds:
        raise WrongTerms(
            "the round does not follow the one that this device was in",
            expected=str(known),
            got=str(ancestry),
        )
    if len(ancestry) > assigned.max_staleness + 1:
        raise WrongTerms(
            "the round is further from the one that this device was assigned in than was offered",
            expected=f"<= {assigned.max_staleness}",
            got=len(ancestry) - 1,
        )
    return msgspec.structs.replace(
        assigned,
        round_number=terms.round_number,
        attempt=terms.attempt,
        encoding=carried.encoding,
    )


def group_work(
    task: str, assigned: Assigned, codec: ContributionCodec, ancestry: tuple[Hash, ...] = ()
) -> secagg.Work:
    """What the terms of a group must say for a contribution of this assignment; `ancestry`: if it was carried."""
    return secagg.Work(
        task=task,
        round_number=assigned.round_number,
        attempt=assigned.attempt,
        plan_hash=assigned.plan_hash,
        ancestry=ancestry or (checkpoints_hash(assigned.checkpoints),),
        bits=codec.bits,
        dimension=codec.dimension,
        num_aux=len(codec.aux_names),
        schema=codec.schema,
        clip=codec.clip,
        n_max=codec.max_group,
    )
