"""Serving engines over HTTP: many requests share the rows of one loop.

`jobs.py` says what the API and the engine tell each other; `batcher.py` runs jobs on an engine, rows joining
and leaving at every step; `app.py` speaks HTTP.
"""
