"""Serving engines over HTTP: many requests share the rows of one loop.

`jobs.py` says what the API and the engine tell each other; `app.py` speaks HTTP. Each engine has a process of
its own, `worker/`, where `batcher.py` runs its jobs, rows joining and leaving at every step, and `works.py`
keeps them in the meantime; `studio.py` is all of these processes together, as the API sees them.

A request's way: `guard.py` lets it in, an interface (`openai/`, `automatic1111/`) takes it, `body.py` or
`form.py` reads it into the interface's fields, `uploads.py` opens the pictures in it, `desk.py` takes the job
to the studio; the studio's pictures are `encoding.py`'s to put into the format that was asked for. Whatever
goes wrong is a `Problem` of `problems.py`. `settings.py` says what the server may do, `listening.py` and
`run.py` run it, `documentation.py` describes it.
"""
