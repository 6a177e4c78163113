"""How fast is one sample answered, beside other servers, on this machine?

Question: how much of what the machine and HTTP allow does evalmode give to one caller and to many, and who gives more?
Quantity: requests per second and latency of each server as a share of what the bare echo does just before and just
after; the median of the rounds, with the least and the most. Absolute times are shown, and claimed of nobody.
Limit: the bare echo (uvicorn, reads the body, answers what evalmode would) for what HTTP costs, and `session.run` in
process for what the network costs. Nothing that speaks HTTP and computes can be faster than both.

    python -m benchmarks.serving --help

Each peer is installed from PyPI in an environment of its own and serves the same ONNX file in the way its documentation
recommends. wrk drives them one after another, in an order that turns with each round. Before anything is timed every
server's answers are held against onnxruntime's. A peer that cannot be installed or started is reported and left out.

    networks.py    workloads.py         what is served, and what is asked
    wire.py        servers.py  peers/   how each is asked, and how each is run
    asking.py                           the two together, for one server and one workload
    installing.py  process.py  load.py  environments, processes, wrk
    measuring.py   records.py           rounds, and what was measured, as it came
    beside.py                           how fast the machine is at that moment
    summary.py     bars.py              medians and ratios; met or not met
    report.py      chart.py             what people read
"""
