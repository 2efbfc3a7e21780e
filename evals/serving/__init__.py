"""`patchkit serve` timed against other servers, and held against broken requests, long runs and signals: `python -m evals.serving`.

Every server is a process of its own on the loopback address, with two threads, and only the one that is asked runs: the others are stopped
by SIGSTOP. Rounds are interleaved, ratios are medians over rounds. Each section writes its JSON to evals/results/serving/ when it ends.
Servers of others have environments of their own (`make serving-peers`); one that is not installed is a row with the reason.
"""
