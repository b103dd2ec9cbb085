"""The engine in a process of its own, so that whatever becomes of it, the server goes on.

`frames.py` carries messages over a socket, `messages.py` says what they mean; `process.py` is what the child
runs, around an engine (`opening.py`) and a batcher; `leash.py` ties it to its parent. On the server's side
`supervisor.py` starts a child, watches it and puts another in its place.

A child that crashes, is killed or ends closes its socket: the server sees that at once. One that hangs tells
on itself: a thread of its own reports several times a second how long the batcher has not gone on. When that
is longer than the setting `step_timeout`, or there is no report at all, it is killed.
"""
