"""What it costs to be seen: metrics, the access log and traces, against a server that counts nothing.

    python -m benchmarks.seeing

Question: what does the operator pay for seeing?
Quantity: the throughput of a small dense network, with 32 connections, as a share of what it is when the same process
is blind: it counts nothing of predictions but how many began, and tells nobody. One loop is at work all the time, so
its throughput is what a second of its CPU time gives; the clock would count what clients and collector take from it.
Two ways to see:
    usual   as it comes: counts all, and writes the sampled log
    all     that as JSON, ten traces a second (as many as there are without a sampler) that leave for a collector every
            five seconds (as the SDK does), and a `GET /metrics` every fifteen (as deploy/ does)
The process is blind and sees by turns of a tenth of a second under one load (switched.py): a machine with neighbours
changes its speed within seconds, so two servers side by side, or one after the other, differ by more than what is
looked for here. Which of two turns sees is left to chance. What there is so many times in a second is there so many
times in a second of seeing. What is said is the predictions in a second of CPU of all turns that see over those of all
that are blind, with the standard error of that by resampling whole stretches.
Limit: .95.
"""
