"""What is measured and how it is told, the same for all of them; needs Python's own library alone."""

import json
import statistics
import time
from pathlib import Path

# As in `benches model`.
N_ROWS, N_POS = 8, 128
N_PROMPT, N_DECODED = 16, 48
STEERED_LAYER = 12
AT_LEAST_S, AT_LEAST_REPEATS = 1.5, 5


def token_ids(d_vocab):
    """The ids of `[8, 128]` tokens, in one list."""
    return [(i + 1) * 7919 % d_vocab for i in range(N_ROWS * N_POS)]


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb():
    """The most memory held since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (kb,) = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kb * 1024 / 1e6


def median_s(run):
    run()
    times, start = [], time.perf_counter()
    while len(times) < AT_LEAST_REPEATS or time.perf_counter() - start < AT_LEAST_S:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def say(name, **numbers):
    print(json.dumps({"name": name, **numbers, "peak_rss_mb": peak_mb()}), flush=True)


def measure(name, n_tokens, run):
    """Times a pass over so many tokens."""
    reset_peak()
    say(name, tokens_per_s=n_tokens / median_s(run))


def measure_decoding(name, decode):
    """Times greedy steps behind a prompt; `decode` gives their seconds, without the prompt's."""
    reset_peak()
    decode()
    say(name, tokens_per_s=N_DECODED / statistics.median(decode() for _ in range(AT_LEAST_REPEATS)))
