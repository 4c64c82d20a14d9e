"""How sure a score is, and whether two scores differ: what the board prints beside every figure, on made-up answers."""

# %% A perfect score on 64 questions does not mean perfect: Wilson's interval is honest at 1, the usual one is not.
from math import sqrt

import numpy as np

from litchi.eval.statistics import holm, mcnemar, wilson, wilson_grouped

for hits, trials in ((64, 64), (512, 512), (507, 512), (48, 64)):
    share, found = hits / trials, wilson(hits, trials)
    half = 1.96 * sqrt(share * (1 - share) / trials)
    usual = f"usual {share - half:.3f} to {share + half:.3f}"
    print(f"{hits} of {trials}: Wilson {found.low:.3f} to {found.high:.3f}, {usual}")
assert wilson(64, 64).low < 0.95 < wilson(512, 512).low

# %% Questions about one picture stand or fall together: 100 pictures with 5 questions are not 500 questions.
rng = np.random.default_rng(0)
asked = np.full(100, 5.0)
hits = 5.0 * (rng.random(100) < 0.8)
alone, grouped = wilson(hits.sum(), asked.sum()), wilson_grouped(hits, asked)
print(f"\nas if independent {alone.low:.3f} to {alone.high:.3f}, in groups {grouped.low:.3f} to {grouped.high:.3f}")
assert grouped.high - grouped.low > alone.high - alone.low

# %% Two models on the same 500 questions, 90 % against 93 %: only the questions on which they disagree count.
theirs = np.array([1.0] * 450 + [0.0] * 50)
ours = theirs.copy()
ours[445:450] = 0.0  # lost 5
ours[450:470] = 1.0  # won 20
a, b = wilson(ours.sum(), 500), wilson(theirs.sum(), 500)
print(f"\nours {a.value:.3f} ({a.low:.3f} to {a.high:.3f}), theirs {b.value:.3f} ({b.low:.3f} to {b.high:.3f})")
p = mcnemar(list(ours), list(theirs))
print(f"the intervals overlap: {a.low < b.high}; paired, the difference is clear: p = {p:.4f}")
assert a.low < b.high and p < 0.01

# %% Six abilities are six chances to be lucky: Holm's correction, as on the board.
raw = [0.004, 0.03, 0.04, 0.2, 0.5, 0.9]
print("\np as measured: ", raw)
print("p after Holm:  ", [round(x, 3) for x in holm(raw)])
assert holm(raw)[1] > 0.05
