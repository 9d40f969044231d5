"""One device: one process, one directory; and, while it works, one child. `Device` is the one inside your application,
see `embedding`.

`runtime` walks the session machine of `protocol.session`; everything it needs has a file of its own:
`home` (the directory and its settings), `identity`, `policy` (the person's rules), `examples` and `matching` (the
private store), `journal` (what must survive a crash), `conditions`, `connection`, `offers` (judged here), `work`
(what is done with a plan), `child` (the process that does it) and `labour` (what runs in there), `progress` (the step
checkpoint), `wanted` (whether it is still worth it), `secure` (the part in a group), `models` (what is served), `slots`
and `serving` (the record of it), `watching` (a release on its way), `cleaning` and `proof` (nothing is left), `status`
and `why` (for the person), `enrolment`, `sealing`.
"""

from homespun.device.embedding import Device

__all__ = ["Device"]
