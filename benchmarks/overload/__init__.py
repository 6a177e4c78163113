"""Ten times as many requests as can be answered.

Question: what do those who are answered feel of those who are too many, and what does the server hold meanwhile?
Quantities: for a model that runs a row at a time and for one that batches, the capacity (what is answered of twice as
many requests as 32 callers ask who ask again when they are answered); then requests at random times (Poisson) at the
capacity and at ten times the capacity: statuses, latency of those answered 200, Retry-After of those answered 429,
memory.
Limits: nothing but 200 and 429; each 200 byte by byte the answer that the model gives in process; a Retry-After of at
least a second with every 429; a p99 of the accepted at most twice the one at capacity; no memory.

    python -m benchmarks.overload              # 60 seconds of each load; ends with 1 if a limit is missed
    python -m benchmarks.overload --write      # writes benchmarks/results/overload.json and .md too

At its capacity a queue has no length of its own: it wanders up to its bound, and takes the longer for it the faster the
model is. A load that is too short, or a little below the capacity, sees a shorter queue and makes the ratio larger.
"""
