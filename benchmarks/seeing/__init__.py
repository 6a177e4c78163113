"""What it costs to be seen: metrics, the access log and traces, against a server that counts nothing.

    python -m benchmarks.seeing

Question: what does the operator pay for seeing?
Quantity: the throughput of a small dense network, with 32 connections, as a share of what it is when the same process
is blind: it counts nothing of predictions but how many began, and tells nobody. One loop is at work all the time, so
its throughput is what a second of its CPU time gives; the clock would count what clients and collector take from it.
Two ways to see:
    usual   as it comes: counts all, and writes the sampled log
    all     that as JSON, `GET /metrics` once a second, and spans to a collector
The process is blind and sees by turns of a second under one load (switched.py), and each turn is compared with the
blind ones before and after it: a machine with neighbours changes its speed within seconds, so two servers side by side,
or one after the other, differ by more than what is looked for here. What is said is the median over all turns, with its
standard error by resampling.
Limit: .95.
"""
