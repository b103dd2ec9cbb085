"""Latency under load: requests arrive as people send them, and each way of serving answers them in turn.

`workload.py` says who asks for what, and when; `baselines.py` serves without sdfast's batcher; `server.py` is
one side as a process; `client.py` sends the requests; `report.py` makes a table and a plot of the latencies.
"""
