"""Every failure a person or a peer can meet, as one tree.

Turn-away is a value, failure is an exception: a device that is not chosen gets a `Rejected` reply, never
one of these.

    HomespunError                 code                    HTTP
    ├── InvalidInput              invalid_input            422   what somebody gave us is wrong
    │   ├── InvalidConfig         invalid_config           422   a setting, a flag, a task description
    │   ├── InvalidCorpus         invalid_corpus           422   text or examples that cannot be used
    │   └── InvalidExample        invalid_example          422   one example of the store
    ├── PlanError                 invalid_plan             422   a plan that cannot be built or must not run
    │   ├── UnsupportedPlan       unsupported_plan         422   unknown format, operator or runtime
    │   ├── UntrustedPlan         untrusted_plan           422   not signed, or not by a publisher we trust
    │   ├── PlanMismatch          plan_mismatch            422   the graphs do not compute what PyTorch does
    │   └── PlanCrashed           plan_crashed             422   killed its process, or needs too much memory or time
    ├── ProtocolError             protocol_error           400   a message that breaks the protocol
    │   ├── BadFrame              bad_frame                400   a body that is cut short, too long or malformed
    │   ├── ShapeMismatch         shape_mismatch           422   right frame, wrong length or encoding
    │   ├── ReportConflict        report_conflict          409   another report for the same assignment
    │   ├── TooLarge              too_large                413   more bytes than the message may have
    │   └── Expired               expired                  410   after the deadline
    ├── NotAuthentic              not_authentic            401   signature, token or key does not verify
    ├── NotAllowed                not_allowed              403   authentic, but may not do this
    ├── NotFound                  not_found                404   no such task, round, blob, device, ...
    ├── Conflict                  conflict                 409   the state does not permit this now
    ├── Unreachable               unreachable              502   the other side does not answer
    ├── StorageFailure            storage_failure          507   disk full, unreadable or damaged file
    ├── NumericFailure            numeric_failure          422   non-finite or overflowing numbers
    └── SecureAggregationError    secagg_failed            409   a group whose sum must not be opened
        ├── WeakTerms             secagg_weak_terms        422   weaker protection than the device asks for
        ├── WrongTerms            secagg_wrong_terms       422   not the work that the device did
        ├── GroupTooSmall         secagg_group_too_small   409   fewer devices than the terms promise
        ├── TooManyDropOuts       secagg_too_many_drop_outs 409  more losses than the graph can bear
        ├── BadRoster             secagg_bad_roster        422   keys or places that do not fit the roster
        ├── BadSignature          secagg_bad_signature     401   not signed by the device it is said to be from
        ├── BadShare              secagg_bad_share         422   a share that does not open, or a wrong secret
        ├── WrongSurvivors        secagg_wrong_survivors   409   a survivor set that cannot be
        ├── SurvivorsChanged      secagg_survivors_changed 409   another survivor set after the first
        └── WrongStep             secagg_wrong_step        409   out of order, or repeated with other content
"""

from __future__ import annotations

from typing import ClassVar, TypeAlias

Detail: TypeAlias = str | int | float | bool | None


class HomespunError(Exception):
    """A named failure: `code` is stable, `message` says what and where, `hint` says what to do.

    `details` holds the ids and values involved (expected versus got). It is shown to people and
    peers, so nothing private ever goes in.
    """

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str = "", **details: Detail) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidInput(HomespunError):
    code = "invalid_input"
    http_status = 422


class InvalidConfig(InvalidInput):
    code = "invalid_config"


class InvalidCorpus(InvalidInput):
    code = "invalid_corpus"


class InvalidExample(InvalidInput):
    code = "invalid_example"


class PlanError(HomespunError):
    code = "invalid_plan"
    http_status = 422


class UnsupportedPlan(PlanError):
    code = "unsupported_plan"


class UntrustedPlan(PlanError):
    code = "untrusted_plan"


class PlanMismatch(PlanError):
    code = "plan_mismatch"


class PlanCrashed(PlanError):
    code = "plan_crashed"


class ProtocolError(HomespunError):
    code = "protocol_error"
    http_status = 400


class BadFrame(ProtocolError):
    code = "bad_frame"


class ShapeMismatch(ProtocolError):
    code = "shape_mismatch"
    http_status = 422


class ReportConflict(ProtocolError):
    code = "report_conflict"
    http_status = 409


class TooLarge(ProtocolError):
    code = "too_large"
    http_status = 413


class Expired(ProtocolError):
    code = "expired"
    http_status = 410


class NotAuthentic(HomespunError):
    code = "not_authentic"
    http_status = 401


class NotAllowed(HomespunError):
    code = "not_allowed"
    http_status = 403


class NotFound(HomespunError):
    code = "not_found"
    http_status = 404


class Conflict(HomespunError):
    code = "conflict"
    http_status = 409


class Unreachable(HomespunError):
    code = "unreachable"
    http_status = 502


class StorageFailure(HomespunError):
    code = "storage_failure"
    http_status = 507


class NumericFailure(HomespunError):
    code = "numeric_failure"
    http_status = 422


class SecureAggregationError(HomespunError):
    code = "secagg_failed"
    http_status = 409


class WeakTerms(SecureAggregationError):
    code = "secagg_weak_terms"
    http_status = 422


class WrongTerms(SecureAggregationError):
    code = "secagg_wrong_terms"
    http_status = 422


class GroupTooSmall(SecureAggregationError):
    code = "secagg_group_too_small"


class TooManyDropOuts(SecureAggregationError):
    code = "secagg_too_many_drop_outs"


class BadRoster(SecureAggregationError):
    code = "secagg_bad_roster"
    http_status = 422


class BadSignature(SecureAggregationError):
    code = "secagg_bad_signature"
    http_status = 401


class BadShare(SecureAggregationError):
    code = "secagg_bad_share"
    http_status = 422


class WrongSurvivors(SecureAggregationError):
    code = "secagg_wrong_survivors"


class SurvivorsChanged(SecureAggregationError):
    code = "secagg_survivors_changed"


class WrongStep(SecureAggregationError):
    code = "secagg_wrong_step"
