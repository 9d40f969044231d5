"""One device: one process, one directory; and, while it works, one child.

`runtime` walks the session machine of `protocol.session`; everything it needs has a file of its own:
`home` (the directory and its settings), `identity`, `examples` (the private store), `journal` (what must
survive a crash), `conditions`, `connection`, `work` (what is done with a plan), `child` (the process that does it) and
`labour` (what runs in there), `progress` (the step checkpoint), `wanted` (whether it is still worth it), `secure` (the
part in a group), `models` (what is served), `cleaning` (and its proof), `status` (why, for the person), `enrolment`,
`sealing`.
"""
