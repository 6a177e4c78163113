"""What is lost when processes end while they are asked: the whole service by SIGTERM, one of two workers by SIGKILL.

    python -m benchmarks.faults               # 20 ends with one worker, 20 with two, 10 kills; about four minutes
    python -m benchmarks.faults --write       # and writes benchmarks/results/faults.json and .md

Quantities: of SIGTERM, requests that were accepted and not answered, and the exit code. Of SIGKILL, requests that
failed beside those that were in flight in the killed worker, connections that were refused, and the seconds until both
workers serve again.
A kill comes when the service has its spare; one soon after the start, or after another kill, takes as long as a start.
Limit: what a process has taken dies with it, so each connection of a killed worker may lose its request.
The bars are nothing lost in 20 of 20 ends; after a kill nothing else failed, nobody refused, and 2 s. Ends with 1 where
one is missed.
"""
