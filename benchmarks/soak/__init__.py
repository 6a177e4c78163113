"""Half an hour of everything at once: mixed and broken requests, new versions, killed workers, bursts.

    python -m benchmarks.soak                 # 30 minutes, 2 workers
    python -m benchmarks.soak --minutes 5

Each answer to a good request is compared with the one that the model gives in process, bit for bit. What was not
answered within `KILL_S` of a kill is counted by itself: a process that is killed cannot answer what it had taken.
Workers are killed in the first half. What each process holds is followed through the last third, so that the youngest
had a sixth of the time to become as large as it does under this load.
Ends with 1 if an answer was wrong, if any other was lost or had a status that it should not, or if a process grew.
"""
