"""One device: one process, one directory; and, while it works, one child. `Device` is the one inside your application,
see `embedding`.

`runtime` walks the session machine of `protocol.session`; everything it needs has a file of its own: `home` (the
directory and its settings), `identity`, `policy` (the person's rules), `current` (settings that change), `examples`
and `matching` (the private store), `journal` (what must survive a crash), `passage` (the session under way),
`conditions`, `measured` and `linux`, `connection`, `offers` (judged here), `work` (what is done with a plan), `child`
(the process that does it) and `labour` (what runs in there), `progress` (the step checkpoint), `wanted` (whether it
is still worth it), `reporting` (to the server) and `secure` (as a member of a group), `models` (what is served),
`slots` and `serving` (the record of it), `watching` (a release on its way), `cleaning` and `proof` (nothing is left),
`status` and `why` (for the person), `enrolment`, `sealing`.
"""

from homespun.device.embedding import Device

__all__ = ["Device"]
