"""A soak: thousands of mixed requests through real sockets, each answer checked. By hand:

    python -m tests.load                        10,000 requests to a `FakeEngine`
    python -m tests.load ENGINE --requests 1000

`soak.py` is the clients, `memory.py` watches the server's processes, `server.py` is a server of a
`FakeEngine`, `fake_worker.py` its worker.
"""
