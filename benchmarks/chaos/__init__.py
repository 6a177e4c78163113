"""A service among callers of every kind, half of them harmful.

Question: does anything that somebody sends cost somebody else an answer, or the service something for good?
Quantities: the statuses of each kind of request; whether each good answer is, bit by bit, the one that the model gives
in process; descriptors, threads, connections and memory before and after.
Limits: no 5xx; no good answer that differs; nothing that grows.

    python -m benchmarks.chaos                  # 10,000 requests, beside 1 worker and then beside 2
    python -m benchmarks.chaos --seed 7 --requests 2000 --workers 2

Rule 1: request i of a seed is the same in every run, so what went wrong can be sent again.
Rule 2: what a kind may be answered is said where it is made; anything else is a failure, and it is printed.
"""
